"""The state of a scoring run on disk: which units are done, and what they gave.

A unit is a shard. A worker writes what it scored under names of its own into `.progress/`. The driver, which alone
holds the output, moves the shard to its final name and then its record to where records count. So a unit counts once
however many workers had it, and one that was thought dead and goes on writing changes nothing that counts.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ManifestRecord, ShardEntry, Timings
from weighted_mtp.schemas.shard_set.shards import flat_values, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts, from_table, to_table
from weighted_mtp.schemas.storage.files import PROGRESS, atomic_write, move, write_text
from weighted_mtp.schemas.storage.locations import Location, list_files

RECORD_KEY = b"record"
READERS = 32
"""Records read at once: object stores answer slowly, but many at a time."""
Suspect = tuple[str, int]
"""A sequence that may have taken down a worker: the fingerprint of a model, and the row."""


class Reject(ManifestRecord):
    """A sequence that a model could not score; its scores under that model are NaN."""

    shard: str
    row: int
    document_id: str
    start: int
    model: str
    reason: str


class UnitRecord(ManifestRecord):
    """What a scored unit gave besides its value counts. Seconds of reading, of the engines, of writing."""

    entry: ShardEntry
    rejects: list[Reject]
    read_seconds: float
    score_seconds: float
    write_seconds: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One worker's try at a unit: the unit's shard name, and a name that no other try has."""

    unit: str
    name: str

    def shard(self, output: Location) -> Location:
        """Where the scored shard waits for the driver."""
        return output / PROGRESS / f"{self.unit}.{self.name}"

    def record(self, output: Location) -> Location:
        """Where the record waits for the driver."""
        return output / PROGRESS / f"{self.unit}.{self.name}.record"

    def note(self, output: Location) -> Location:
        """Where a careful worker notes which sequence it tries next."""
        return output / PROGRESS / f"{self.unit}.{self.name}.suspect"


def write_attempt(output: Location, attempt: Attempt, table: pa.Table, rejects: int) -> ShardEntry:
    """Write a scored shard where the driver finds it; return its entry. `write_record` must follow."""
    return replace(write_shard(attempt.shard(output), table), name=attempt.unit, rejects=rejects)


def write_record(output: Location, attempt: Attempt, record: UnitRecord, counts: dict[str, ValueCounts]) -> None:
    """Write the record of a scored shard: one Parquet file with the value counts and, as metadata, the rest."""
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
    """Make an attempt count: the shard gets its name, then the record, which is what makes the unit done."""
    move(attempt.shard(output), output / attempt.unit)
    move(attempt.record(output), output / PROGRESS / attempt.unit)


def find_done(output: Location, units: list[ShardEntry]) -> set[str]:
    """Names of the units that are done."""
    done = list_files(output / PROGRESS).keys() & list_files(output).keys()
    return {unit.name for unit in units} & done


def note_suspect(output: Location, attempt: Attempt, model: str, row: int) -> None:
    """Note which sequence of a unit is tried next: if the worker dies now, it is a suspect."""
    write_text(attempt.note(output), f"{model} {row}")


def read_suspect(output: Location, attempt: Attempt) -> Suspect | None:
    """The sequence that was noted last, None if there is none or all were scored; forget the note."""
    note = attempt.note(output)
    if note.name not in list_files(note.parent):  # a store's own answer may be one from before the note
        return None
    model, row = note.read_text().split()
    note.unlink()
    return model, int(row)


def clear_attempts(output: Location) -> None:
    """Remove what workers of earlier, killed runs left, and records whose shard is gone."""
    shards = list_files(output)
    for name in list_files(output / PROGRESS):
        if ".parquet." in name or (name.endswith(".parquet") and name not in shards):
            (output / PROGRESS / name).unlink(missing_ok=True)


@dataclass
class Gathered:
    """What all units of a run gave: their entries and rejects in order, their timings, and value counts by column."""

    entries: list[ShardEntry]
    rejects: list[Reject]
    timings: Timings
    counts: dict[str, ValueCounts]


def gather(output: Location, units: list[str]) -> Gathered:
    """Put the records of all units together.

    Raises:
        UserError: a shard is not as it was written; it will be scored again.
    """
    try:
        return _gather(output, units)
    except DamagedUnitError as error:
        (output / PROGRESS / error.unit).unlink(missing_ok=True)
        raise


def _gather(output: Location, units: list[str]) -> Gathered:
    sizes = list_files(output)
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
        for name, of_column in from_table(table).items():
            gathered.counts.setdefault(name, ValueCounts()).merge(of_column)
    return gathered


class DamagedUnitError(UserError):
    """A unit whose shard or record is not as it was written."""

    def __init__(self, output: Location, unit: str) -> None:
        super().__init__(
            f"{output / unit}: the shard or its record is not as it was written; "
            "rerun the same command, which scores it again"
        )
        self.unit = unit


def read_records(output: Location, units: list[str]) -> Iterator[tuple[UnitRecord, pa.Table]]:
    """Records of units that are done, in order, each with its table of value counts; a few are read ahead.

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
