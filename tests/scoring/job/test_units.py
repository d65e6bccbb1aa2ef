"""Units on disk: attempts, notes and records, without workers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA, PROGRESS
from weighted_mtp.scoring.job.units import (
    Attempt,
    RejectedSequence,
    UnitRecord,
    clear_attempts,
    commit,
    count_values,
    find_done,
    gather,
    new_attempt,
    note_sequence,
    pop_note,
    read_records,
    write_attempt,
    write_record,
)


@dataclass
class Output:
    """The directory of a run, and the set that it scores."""

    path: Path
    source: ShardSet

    def write(self, index: int, rejects: list[RejectedSequence]) -> Attempt:
        """Write an attempt at a shard; its score column is that of the source."""
        table = self.source.read(index)
        attempt = new_attempt(self.source.manifest.shards[index].name)
        entry = write_attempt(self.path, attempt, table, len(rejects))
        record = UnitRecord(entry=entry, rejects=rejects, read_seconds=1.0 + index, score_seconds=10.0 + index)
        write_record(self.path, attempt, record, count_values(table, ("loss_a",)))
        return attempt

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.source.manifest.shards]

    @property
    def progress(self) -> set[str]:
        return {file.name for file in (self.path / PROGRESS).iterdir()}


@pytest.fixture
def output(tmp_path: Path, make_shard_set: Callable[..., ShardSet]) -> Output:
    """Two shards of two sequences."""
    scores = [[np.nan, 1.0], [np.nan, 2.0], [np.nan, 2.0], [np.nan, 3.0]]
    path = tmp_path / "output"
    (path / PROGRESS).mkdir(parents=True)
    return Output(path, make_shard_set([[1, 2]] * 4, {"loss_a": scores}))


def reject(shard: str, row: int) -> RejectedSequence:
    return RejectedSequence(shard=shard, row=row, document_id=f"doc-{row}", start=0, model="m", reason="bad")


def test_an_attempt_counts_once_it_is_committed(output: Output) -> None:
    shards = output.source.manifest.shards
    attempt = output.write(0, [])
    assert find_done(output.path, shards) == set()
    commit(output.path, attempt)
    assert find_done(output.path, shards) == {output.names[0]}
    assert (output.path / DATA / output.names[0]).read_bytes() == (
        output.source.path / DATA / output.names[0]
    ).read_bytes()
    late = output.write(0, [])
    assert late.name != attempt.name, "two attempts at a unit never share a file"


def test_results_are_gathered_in_the_order_of_the_shards(output: Output) -> None:
    second = reject(output.names[1], 1)
    for attempt in (output.write(1, [second]), output.write(0, [])):
        commit(output.path, attempt)
    found = gather(output.path, output.names)
    assert [entry.name for entry in found.entries] == output.names
    assert [entry.rejects for entry in found.entries] == [0, 1]
    assert found.rejects == [second]
    assert (found.timings.read_seconds, found.timings.score_seconds) == ([1, 2], [10, 11])
    values, counts = found.counts["loss_a"].distinct()
    assert (values.tolist(), counts.tolist(), found.counts["loss_a"].missing) == ([1, 2, 3], [1, 2, 1], 4)


def test_a_shard_counts_as_done_only_with_its_record_and_as_written_only_in_its_size(output: Output) -> None:
    commit(output.path, output.write(0, []))
    name = output.names[0]
    units: list[ShardEntry] = gather(output.path, [name]).entries
    assert find_done(output.path, units) == {name}
    shard = output.path / DATA / name
    content = shard.read_bytes()
    shard.unlink()
    assert find_done(output.path, units) == set()
    shard.write_bytes(content[:-1])
    assert find_done(output.path, units) == {name}
    with pytest.raises(UserError, match=f"{name}: the shard or its record was damaged or changed; rerun"):
        gather(output.path, [name])
    shard.write_bytes(content)
    assert find_done(output.path, units) == set(), "it will be scored again"


def test_a_damaged_record_is_named(output: Output) -> None:
    commit(output.path, output.write(0, []))
    (output.path / PROGRESS / output.names[0]).write_bytes(b"no record")
    with pytest.raises(UserError, match=f"{output.names[0]}: the shard or its record was damaged or changed"):
        list(read_records(output.path, output.names[:1]))


def test_a_note_is_taken_once(output: Output) -> None:
    attempt = Attempt(output.names[0], "1")
    assert pop_note(output.path, attempt) is None
    note_sequence(output.path, attempt, "fingerprint", 3)
    note_sequence(output.path, attempt, "fingerprint", 4)
    assert pop_note(output.path, attempt) == ("fingerprint", 4)
    assert pop_note(output.path, attempt) is None


def test_what_earlier_runs_left_behind_is_removed_but_not_what_is_done(output: Output) -> None:
    commit(output.path, output.write(0, []))
    commit(output.path, output.write(1, []))
    (output.path / DATA / output.names[1]).unlink()
    note_sequence(output.path, output.write(1, []), "fingerprint", 0)
    (output.path / PROGRESS / "request.json").touch()
    assert len(output.progress) == 6
    clear_attempts(output.path)
    assert output.progress == {output.names[0], "request.json"}


def test_counts_of_named_columns_alone() -> None:
    scores = pa.array([[1.0, 1.0], [2.0]], pa.list_(pa.float16()))
    counts = count_values(pa.table({"a": scores, "b": scores}), ("a",))
    assert list(counts) == ["a"]
    assert [part.tolist() for part in counts["a"].distinct()] == [[1, 2], [2, 1]]
