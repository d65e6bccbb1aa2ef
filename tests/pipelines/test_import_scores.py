"""`wmtp import` from the command line to the commands that use its columns."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values

NAN = math.nan


@pytest.fixture
def source(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    return make_shard_set([[1, 2, 3], [4, 5]], {"loss_reference": [[NAN, 1, 2], [NAN, 0.5]]})


def write_scores(path: Path) -> Path:
    rows = [{"document_id": "doc-0", "mine": [None, 3, 3], "quality": 1, "skipped": [1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_column_is_imported_and_used_without_models(
    source: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_scores(tmp_path / "theirs.jsonl")
    output, more = tmp_path / "output", tmp_path / "more"
    command = ["import", "--input", str(source.path), "--scores", str(file), "--output", str(output)]
    command += ["--columns", "mine"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "5 tokens in 2 sequences, 1 of them without scores" in printed
    assert f"next: wmtp weights {output} --weights.formula mine" in printed
    row = next(line for line in printed.splitlines() if " mine " in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["3", "3.000", "0.000"]
    assert main(command) == 0
    assert f"{output} is already complete: 5 tokens" in capsys.readouterr().out
    contrasts = ["--contrasts", "{gap: mine - loss_reference}"]
    assert main(["score", "--input", str(output), "--output", str(more), *contrasts]) == 0
    gap = flat_values(ShardSet.open(more).read(0, ["input_ids", "gap"])["gap"])
    assert gap.tolist()[1:3] == [2, 1]
    assert main(["verify", str(more)]) == 0
    assert main(["weights", str(more), "--weights.formula", "mine"]) == 0
    assert main(["inspect", str(output)]) == 0
    assert main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("imported, mine of 'theirs.jsonl' (SHA-256") == 3


def test_mistakes_are_one_line(source: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_scores(tmp_path / "a.jsonl")
    assert main(["import", "--input", str(source.path), "--scores", str(file), "--output", str(tmp_path / "o")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"wmtp import: error: {file}: row 1 (document 'doc-0'): 'skipped' is not as long")
