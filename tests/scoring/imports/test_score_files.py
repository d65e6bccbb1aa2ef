"""Finding and opening score files."""

import os
from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports.score_files import find_score_files, open_score_file


def test_a_file_counts_once_and_hidden_files_do_not(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.PARQUET", ".c.jsonl", "_d.jsonl", "e.txt"):
        (tmp_path / name).touch()
    found = find_score_files([str(tmp_path), f"{tmp_path}/*.jsonl"])
    assert [file.name for file in found] == ["a.PARQUET", "b.jsonl", "_d.jsonl"]


def test_json_lines_may_be_compressed_and_parquet_may_not(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.JSON.ZST", "c.ndjson.bz2", "d.jsonl.xz", "e.parquet.gz", "f.gz"):
        (tmp_path / name).touch()
    assert [file.name for file in find_score_files([str(tmp_path)])] == ["a.jsonl.gz", "b.JSON.ZST", "c.ndjson.bz2"]
    for name in ("d.jsonl.xz", "e.parquet.gz", "f.gz"):
        with pytest.raises(UserError, match=f"{name}: is no Parquet or JSON Lines file by its name"):
            find_score_files([str(tmp_path / name)])


def test_links_are_followed_and_other_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("scores/a.jsonl.zstd", "scores/b.jsonl.xz", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "scores" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to("../scores")
    (tmp_path / "scores" / "broken.jsonl").symlink_to("nowhere")
    with caplog.at_level("INFO", "weighted_mtp"):
        found = find_score_files([str(tmp_path / "scores")])
    assert [str(file.relative_to(tmp_path / "scores")) for file in found] == ["a.jsonl.zstd", "linked/c.jsonl"]
    [message] = caplog.messages
    assert message.endswith(
        "left out 3 files (1 .xz, 1 .jsonl, 1 without suffix): b.jsonl.xz, broken.jsonl, linked/circle"
    )
    assert [file.name for file in find_score_files([f"{tmp_path}/scores/**/c.jsonl"])] == ["c.jsonl"]
    with pytest.raises(FileNotFoundError):
        open_score_file(find_score_files([f"{tmp_path}/scores/bro*.jsonl"])[0])


def test_pipes_and_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("pipe.jsonl", "pip*.jsonl"):
        with pytest.raises(UserError, match=r"pipe\.jsonl: is a pipe or a device"):
            find_score_files([str(tmp_path / name)])
    (tmp_path / "caf\udce9.jsonl").touch()
    for name in ("", "c*.jsonl"):
        with pytest.raises(UserError, match=r"udce9\.jsonl: the name is not in UTF-8; rename it"):
            find_score_files([str(tmp_path / name)])


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(it has no rows\)"):
        open_score_file(UPath(tmp_path / "a.jsonl"))
