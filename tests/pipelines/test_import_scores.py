"""`wmtp import` from the command line to the commands that use its columns."""

import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.scoring.imports.run import add_columns
from weighted_mtp.training.weighting.token_weights import token_weights

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


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.integration
@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.slow
def test_columns_of_two_sets_weight_tokens_as_those_of_one(
    make_shard_set: Callable[..., ShardSet],
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses lie in one set, numbers and labels of documents in another, which was imported from a compressed file."""
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, 250, (12, 8)).tolist()
    losses = [[NAN, *rng.random(7)] for _ in sequences]
    tokens = make_shard_set(sequences, name="tokens", rows_per_shard=5)
    scored = make_shard_set(sequences, {"loss_reference": losses}, "scored", rows_per_shard=5)
    rows = [{"document_id": f"doc-{n}", "quality": float(n * n), "group": "abc"[n % 3]} for n in range(12)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    more, both = tmp_path / "more", tmp_path / "both"
    command = ["import", "--input", str(tokens.path), "--scores", str(tmp_path / "a.jsonl.gz"), "--output", str(more)]
    assert main(command) == 0
    add_columns(scored, both, rows)
    formula = "sigmoid(standardise(quality, by=group)) * loss_reference"
    expected = list(token_weights(both, {"formula": formula}))
    assert len(np.unique(np.concatenate(expected))) == 12 * 7 + 1

    weights, runs = ["--weights.formula", formula], {}
    for sets in ([scored.path, more], [more, scored.path], [both]):
        np.testing.assert_equal(list(token_weights(sets, {"formula": formula})), expected)
        given, output = ",".join(map(str, sets)), tmp_path / f"run-{len(runs)}"
        capsys.readouterr()
        assert main(["weights", given, *weights]) == 0
        report = capsys.readouterr().out
        command = ["train", "--input", given, "--model", str(make_model()), "--output", str(output), *weights]
        assert main([*command, "--max_steps", "2", "--batch_size", "2", "--sequence_length", "16"]) == 0
        loss = json.loads((output / "summary.json").read_text())["loss"]
        runs[given] = loss, report[report.index("formula") :].replace("─", "").split()
    first, *others = runs.values()
    assert others == [first, first]
    table = report[report.index("┃ group ") :].splitlines()
    assert sorted(line.split()[1] for line in table[2:5]) == ["a", "b", "c"], "the weights by label"
