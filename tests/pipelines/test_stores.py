"""Commands on an object store."""

from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

from pipelines.cli import main
from schemas.shard_set import ShardSet

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
SCORES = {"excess_loss": [[float("nan"), 1, 2], [float("nan"), 0.5], [float("nan"), 4, -4, 3]]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_set_is_verified_listed_and_inspected_where_it_lies(
    make_shard_set: Callable[..., ShardSet], s3: UPath, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shard_set(SEQUENCES, SCORES, "deep/below", parent=s3)
    assert main(["verify", str(shards.path)]) == 0
    assert f"{s3}/deep/below: all 4 parts are what the manifest says" in capsys.readouterr().out
    assert main(["list", str(s3)]) == 0
    assert capsys.readouterr().out.startswith(f"{s3}/deep/below: 9 tokens, ")
    assert main(["inspect", str(shards.path), "--samples", "1"]) == 0
    report = capsys.readouterr().out
    assert f"{s3}/deep/below" in report
    assert "highest excess_loss" in report
    (shards.path / shards.manifest.shards[0].name).unlink()
    assert main(["verify", str(shards.path)]) == 1
    assert "1 of 4 parts differ" in capsys.readouterr().err
