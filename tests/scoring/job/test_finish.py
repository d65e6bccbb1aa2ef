"""The end of a run whose units were written by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Contrast, write_manifest
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.shards import list_column
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import PROGRESS, TOKENIZER, copy_files
from weighted_mtp.scoring.job.finish import earlier_rejects, finish
from weighted_mtp.scoring.job.units import (
    RejectedSequence,
    UnitRecord,
    commit,
    count_values,
    new_attempt,
    write_attempt,
    write_record,
)

ORIGIN = Contrast(minuend="loss_a", subtrahend="loss_a")


def reject(shard: str, row: int, model: str) -> RejectedSequence:
    return RejectedSequence(shard=shard, row=row, document_id="d", start=0, model=model, reason="bad")


@pytest.fixture
def source(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    """Two shards of two sequences of two tokens. An earlier run rejected row 0 of the first."""
    made = make_shard_set([[1, 2]] * 4, {"loss_a": [[np.nan, value] for value in (np.nan, 2, 3, 4)]})
    first, second = made.manifest.shards
    (made.path / REJECTS).write_text(reject(first.name, 0, "earlier").model_dump_json() + "\n")
    write_manifest(made.path, made.manifest.model_copy(update={"shards": [replace(first, rejects=1), second]}))
    return ShardSet.open(made.path)


def score(source: ShardSet, output: Path, index: int, values: list[float], rejects: list[RejectedSequence]) -> None:
    """Complete a unit whose column `new` has these values."""
    scores = np.array(values, np.float16)
    table = source.read(index).append_column("new", list_column(scores, np.array([2, 2])))
    attempt = new_attempt(source.manifest.shards[index].name)
    entry = write_attempt(output, attempt, table, len({line.row for line in rejects}))
    record = UnitRecord(entry=entry, rejects=rejects, read_seconds=1, score_seconds=2, write_seconds=3)
    write_record(output, attempt, record, count_values(table, ("new",)))
    commit(output, attempt)


def test_manifest_statistics_and_rejects_of_all_units(source: ShardSet, tmp_path: Path) -> None:
    output = tmp_path / "output"
    copy_files(source.path / TOKENIZER, output / TOKENIZER)
    (output / PROGRESS).mkdir()
    first, second = (shard.name for shard in source.manifest.shards)
    # Row 0 of the first shard was rejected before, and is again by another model; row 1 of the second by two models.
    new = [reject(first, 0, "m"), reject(second, 1, "m"), reject(second, 1, "n")]
    score(source, output, 1, [np.nan, 5, np.nan, np.nan], new[1:])
    score(source, output, 0, [np.nan, np.nan, np.nan, 1], new[:1])
    finished = finish(output, source, {"new": ORIGIN}, '{"command": "score"}')

    manifest = finished.manifest
    assert [entry.rejects for entry in manifest.shards] == [1, 1], "a sequence counts once"
    lines = [RejectedSequence.model_validate_json(line) for line in (output / REJECTS).read_text().splitlines()]
    assert lines == [reject(first, 0, "earlier"), *new]
    assert manifest.columns["loss_a"] == source.manifest.columns["loss_a"]
    assert manifest.columns["new"].origin == ORIGIN
    statistics = manifest.columns["new"].statistics
    assert (statistics.count, statistics.missing, statistics.mean, statistics.std) == (2, 6, 3, 2)
    assert (statistics.quantiles["0.0"], statistics.quantiles["0.5"], statistics.quantiles["1.0"]) == (1, 1, 5)
    assert (manifest.derived_from, manifest.request) == (source.manifest.digest, {"command": "score"})
    assert manifest.timings.score_seconds == [2, 2]
    assert [check for check in verify(output, manifest) if check.fault] == []


def test_rejects_of_the_input_must_be_readable(source: ShardSet) -> None:
    (found,) = earlier_rejects(source)
    assert found.model == "earlier"
    (source.path / REJECTS).write_text("{}\n")
    with pytest.raises(UserError, match=r"rejects\.jsonl: missing or damaged \(shard: Field required\); restore it"):
        earlier_rejects(source)
    (source.path / REJECTS).unlink()
    with pytest.raises(UserError, match=r"rejects\.jsonl: missing or damaged"):
        earlier_rejects(source)


def test_an_input_without_rejects_needs_no_file(make_shard_set: Callable[..., ShardSet]) -> None:
    assert earlier_rejects(make_shard_set([[1, 2]])) == []
