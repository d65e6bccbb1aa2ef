"""Reports on the screen and as pages."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

from weighted_mtp.pipelines.reports.pages import check_page, show
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet


def test_only_names_of_pages_are_written() -> None:
    for name in (None, Path("a.html"), Path("b.c.htm")):
        check_page(name)
    for wrong in ("manifest.json", "html", "a.html.gz"):
        with pytest.raises(UserError, match=f"--html {wrong}: give a name that ends in .html"):
            check_page(Path(wrong))


def test_a_page_does_not_become_a_part_of_a_shard_set(make_shard_set: Callable[..., ShardSet]) -> None:
    shards = make_shard_set([[1, 2]])
    for page in (shards.path / "page.html", shards.path / "data" / "new" / "page.html"):
        with pytest.raises(UserError, match=f"lies inside the shard set {shards.path}; choose another directory"):
            check_page(page)
    check_page(shards.path.parent / "page.html")


def test_a_report_is_printed_and_written_with_its_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "deep" / "page.html"
    show(Text("a < b [bold]", style="on #a1d99b"), page)
    assert capsys.readouterr().out == "a < b [bold]\n"
    content = page.read_text()
    assert "a &lt; b [bold]" in content
    assert "background-color: #a1d99b" in content


def test_without_a_page_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    show("text", None)
    assert list(tmp_path.iterdir()) == []
