"""Units of work, and the state of a scoring run on disk: completed units and their records.

A unit is a shard. A worker writes its results under unique names into `.progress/`. The driver, the only process that
locks the output, moves the shard to its final name and then its record. So a unit counts once even if several workers
scored it, and late writes of a worker presumed dead have no effect.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ManifestRecord, ShardEntry, Timings
from weighted_mtp.schemas.shard_set.shards import flat_values, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts, from_table, to_table
from weighted_mtp.schemas.storage.files import DATA, PROGRESS, atomic_write, move, write_text
from weighted_mtp.schemas.storage.locations import Location, list_files

RECORD_KEY = b"record"
READERS = 32
"""Records read at once: object stores are slow to answer, but answer many requests at a time."""
SequenceKey = tuple[str, int]
"""A sequence of a unit under one model: the model's fingerprint, and the row."""


class RejectedSequence(ManifestRecord):
    """A sequence that a model could not score; its scores under that model are NaN. A line of `rejects.jsonl`."""

    shard: str
    row: int
    document_id: str
    start: int
    model: str
    reason: str


class UnitRecord(ManifestRecord):
    """Result of a unit except its value counts, with the seconds of reading, scoring and writing."""

    entry: ShardEntry
    rejects: list[RejectedSequence]
    read_seconds: float
    score_seconds: float
    write_seconds: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One worker's attempt at a unit: the unit's shard name, and a unique name."""

    unit: str
    name: str

    def shard(self, output: Location) -> Location:
        """Location of the scored shard until the commit."""
        return output / PROGRESS / f"{self.unit}.{self.name}"

    def record(self, output: Location) -> Location:
        """Location of the record until the commit."""
        return output / PROGRESS / f"{self.unit}.{self.name}.record"

    def note(self, output: Location) -> Location:
        """Location of the note with the next sequence in one-by-one mode."""
        return output / PROGRESS / f"{self.unit}.{self.name}.sequence"


@dataclass(frozen=True)
class Unit:
    """A shard to score, and the attempt at it.

    Attributes:
        shard: the shard.
        attempt: names of the files that the worker writes.
        one_by_one: whether to score one sequence at a time and note each one first.
        given_up: sequences not to try, and why.
    """

    shard: ShardEntry
    attempt: Attempt
    one_by_one: bool = False
    given_up: dict[SequenceKey, str] = field(default_factory=dict)


def new_attempt(unit: str) -> Attempt:
    """A new attempt at the unit with this shard name."""
    return Attempt(unit, uuid4().hex[:12])


@dataclass
class ScoredShard:
    """A shard with its score columns, not yet written."""

    table: pa.Table
    rejects: list[RejectedSequence]
    score_seconds: float


def write_unit(
    output: Location, attempt: Attempt, scored: ScoredShard, columns: tuple[str, ...], read_seconds: float
) -> None:
    """Write a scored shard and its record under the names of an attempt.

    Args:
        output: directory of the run.
        attempt: the attempt.
        scored: the shard.
        columns: its new score columns.
        read_seconds: duration of reading the unscored shard.
    """
    started = time.monotonic()
    entry = write_attempt(output, attempt, scored.table, len({reject.row for reject in scored.rejects}))
    counts = count_values(scored.table, columns)
    record = UnitRecord(
        entry=entry,
        rejects=scored.rejects,
        read_seconds=round(read_seconds, 3),
        score_seconds=round(scored.score_seconds, 3),
        write_seconds=round(time.monotonic() - started, 3),
    )
    write_record(output, attempt, record, counts)


def write_attempt(output: Location, attempt: Attempt, table: pa.Table, rejects: int) -> ShardEntry:
    """Write a scored shard for the driver to commit; return its manifest entry. `write_record` must follow."""
    return replace(write_shard(attempt.shard(output), table), name=attempt.unit, rejects=rejects)


def write_record(output: Location, attempt: Attempt, record: UnitRecord, counts: dict[str, ValueCounts]) -> None:
    """Write the record of a scored shard: a Parquet file of its value counts, with `record` as metadata."""
    table = to_table(counts).replace_schema_metadata({RECORD_KEY: record.model_dump_json()})
    with atomic_write(attempt.record(output)) as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=["column"],
            column_encoding=dict.fromkeys(("value", "count"), "BYTE_STREAM_SPLIT"),  # a third of the size
            write_statistics=False,
        )


def count_values(table: pa.Table, columns: tuple[str, ...]) -> dict[str, ValueCounts]:
    """Value counts of score columns."""
    counts = {name: ValueCounts() for name in columns}
    for name, of_column in counts.items():
        of_column.add(flat_values(table[name]))
    return counts


def commit(output: Location, attempt: Attempt) -> None:
    """Move a finished attempt to its final names: the shard, then the record, which makes the unit done."""
    (output / DATA).mkdir(exist_ok=True)
    move(attempt.shard(output), output / DATA / attempt.unit)
    move(attempt.record(output), output / PROGRESS / attempt.unit)


def find_done(output: Location, units: list[ShardEntry]) -> set[str]:
    """Names of the completed units."""
    done = list_files(output / PROGRESS).keys() & list_files(output / DATA).keys()
    return {unit.name for unit in units} & done


def note_sequence(output: Location, attempt: Attempt, model: str, row: int) -> None:
    """Note the next sequence, for the driver to read if the worker dies."""
    write_text(attempt.note(output), f"{model} {row}")


def pop_note(output: Location, attempt: Attempt) -> SequenceKey | None:
    """Read and remove the note of an attempt; None if no sequence was noted or all were scored."""
    note = attempt.note(output)
    if note.name not in list_files(note.parent):  # a store may answer `exists` from a stale cache
        return None
    model, row = note.read_text().split()
    note.unlink()
    return model, int(row)


def clear_attempts(output: Location) -> None:
    """Remove the files of unfinished attempts in earlier runs, and records whose shard is gone."""
    shards = list_files(output / DATA)
    for name in list_files(output / PROGRESS):
        if ".parquet." in name or (name.endswith(".parquet") and name not in shards):
            (output / PROGRESS / name).unlink(missing_ok=True)


@dataclass
class Gathered:
    """Results of all units: entries, rejects and timings in order, and the summed value counts of each column."""

    entries: list[ShardEntry]
    rejects: list[RejectedSequence]
    timings: Timings
    counts: dict[str, ValueCounts]


def gather(output: Location, units: list[str]) -> Gathered:
    """Combine the records of all units.

    Raises:
        UserError: a shard or record was damaged; the next run scores it again.
    """
    try:
        return _gather(output, units)
    except DamagedUnitError as error:
        (output / PROGRESS / error.unit).unlink(missing_ok=True)
        raise


def _gather(output: Location, units: list[str]) -> Gathered:
    sizes = list_files(output / DATA)
    gathered = Gathered([], [], Timings(read_seconds=[], score_seconds=[], write_seconds=[]), {})
    for record, table in read_records(output, units):
        entry = record.entry
        if sizes.get(entry.name) != entry.bytes:
            raise DamagedUnitError(output, entry.name)
        gathered.entries.append(entry)
        gathered.rejects.extend(record.rejects)
        gathered.timings.read_seconds.append(record.read_seconds)
        gathered.timings.score_seconds.append(record.score_seconds)
        gathered.timings.write_seconds.append(record.write_seconds)
        try:
            counts = from_table(table)
        except ValueError as error:
            raise DamagedUnitError(output, entry.name) from error
        for name, of_column in counts.items():
            gathered.counts.setdefault(name, ValueCounts()).merge(of_column)
    return gathered


class DamagedUnitError(UserError):
    """The shard or record of a unit is damaged."""

    def __init__(self, output: Location, unit: str) -> None:
        super().__init__(
            f"{output / DATA / unit}: the shard or its record was damaged or changed; "
            "rerun the same command to score it again"
        )
        self.unit = unit


def read_records(output: Location, units: list[str]) -> Iterator[tuple[UnitRecord, pa.Table]]:
    """Records of completed units in order, each with its table of value counts; up to `READERS` are read ahead.

    Raises:
        DamagedUnitError: a record cannot be read.
    """

    def read(unit: str) -> tuple[UnitRecord, pa.Table]:
        content = pa.BufferReader((output / PROGRESS / unit).read_bytes())
        try:
            table = pq.ParquetFile(content, read_dictionary=["column"]).read(use_threads=False)
            return UnitRecord.model_validate_json(table.schema.metadata[RECORD_KEY]), table
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DamagedUnitError(output, unit) from error

    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[Future[tuple[UnitRecord, pa.Table]]] = deque()
        for unit in units:
            ahead.append(pool.submit(read, unit))
            if len(ahead) > READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
