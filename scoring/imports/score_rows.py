"""Reading files of scores that other tools wrote: Parquet or JSON Lines.

A row has a `document_id`, optionally a `start`, and columns with a list of numbers, a number or a string. Nothing in
these files is trusted. Lists become float16 arrays batch by batch, because Python lists of a corpus would not fit.
"""

import glob
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from weighted_mtp.schemas.configs.common import check_identifier, is_reserved
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.locations import Location, kind_of, locate, walk_files

Kind = Literal["score", "number", "label"]
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", *JSON_SUFFIXES)
KEYS = ("document_id", "start")
BATCH_ROWS = 256
BATCH_BYTES = 1 << 23
"""Bytes of JSON Lines parsed at once; the column types are those of the first such part."""
EXCESS_NUMBERS = 1 << 20
"""Reading stops at this many numbers of a column more than twice the tokens of the set."""
JSON_TYPES: dict[Kind, pa.DataType] = {"score": pa.list_(pa.float64()), "number": pa.float64(), "label": pa.string()}
SHOWN = 60
"""Most characters of an id or a name in a message."""
SHOWN_REASON = 200


def quoted(text: str) -> str:
    """Foreign text for a message: truncated, quoted, and without control characters."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def find_score_files(names: Sequence[str]) -> list[Location]:
    """Files of scores in reading order: each name is a file, a directory, or a glob. A file counts once.

    Raises:
        UserError: a name matches no Parquet or JSON Lines file.
    """
    found: dict[str, Location] = {}
    for name in names:
        path = locate(name)
        kind = kind_of(path)
        if kind == "file":
            files = [path]
        elif kind == "directory":
            inside = [PurePosixPath(file) for file in sorted(walk_files(path))]
            visible = [file for file in inside if not any(part.startswith((".", "_")) for part in file.parts)]
            files = [path / file.as_posix() for file in visible if file.suffix.lower() in SUFFIXES]
        elif isinstance(path, Path):
            files = [locate(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
        else:
            files = [locate(path.fs.unstrip_protocol(match)) for match in sorted(path.fs.glob(path.path))]
        if not files:
            raise UserError(f"--scores {name}: no Parquet or JSON Lines file ({', '.join(SUFFIXES)}); check the path")
        found |= {str(file): file for file in files}
    for file in found.values():
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: is no Parquet or JSON Lines file by its name ({', '.join(SUFFIXES)}); convert it")
    return list(found.values())


@dataclass
class Lists:
    """A column of lists: all their values, float16 [numbers], and first value and length of each list, int64 [rows].

    The length of a missing list is -1.
    """

    values: np.ndarray
    first: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class ScoreRows:
    """The rows of all files.

    Attributes:
        keys: `document_id` (string), `start` (int64 or null), and `file` and `row` that a row came from, from 0.
        lists: columns of scores.
        numbers: columns of numbers, float32 [rows], NaN where a value is missing.
        labels: columns of strings, null where a value is missing.
    """

    files: list[Location]
    keys: pl.DataFrame
    lists: dict[str, Lists]
    numbers: dict[str, np.ndarray]
    labels: dict[str, pa.ChunkedArray]

    def describe(self, row: int) -> str:
        """The place of a row, for messages."""
        document, _, file, number = self.keys.row(row)
        return f"{self.files[file]}: row {number + 1:,} (document {quoted(document)})"


@dataclass(frozen=True)
class FileTypes:
    """Arrow types of the columns of a file. JSON Lines have those of its first rows."""

    path: Location
    types: dict[str, pa.DataType]

    def type_of(self, column: str) -> pa.DataType:
        """The type of a column.

        Raises:
            UserError: the file has no such column.
        """
        if column not in self.types:
            raise UserError(f"{self.path}: has no column {quoted(column)}; all score files need the same columns")
        return self.types[column]


def read_types(path: Location) -> FileTypes:
    """Names and types of the columns of a file.

    Raises:
        UserError: the file cannot be read.
    """
    with reading(path):
        if path.suffix.lower() == ".parquet":
            with path.open("rb") as source:
                schema = pq.read_schema(source)
        else:
            with open_lines(path) as source:
                schema = parse_json(source.readlines(BATCH_BYTES), 0).schema
        if len(set(schema.names)) < len(schema.names):
            raise ValueError("two columns have the same name")
    return FileTypes(path, dict(zip(schema.names, schema.types, strict=True)))


@contextmanager
def reading(path: Location) -> Iterator[None]:
    """Turn damage of a file into a UserError. Arrow also raises errors of the system for damaged Parquet."""
    try:
        yield
    except (pa.ArrowException, ValueError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or error.__cause__):  # of the system or a store
            raise
        reason = repr(first_line(error).rstrip(".")[:SHOWN_REASON])[1:-1]
        raise UserError(f"{path}: cannot be read ({reason}); repair it or leave it out") from error


def choose_columns(files: Sequence[FileTypes], wanted: Sequence[str]) -> dict[str, Kind]:
    """The columns to import and their kinds.

    Args:
        files: columns of all files.
        wanted: names given by the user; none means all columns of the files.

    Raises:
        UserError: a column is missing in a file, or its name or type cannot be used.
    """
    names = list(wanted) or [name for name in files[0].types if name not in KEYS]
    where = files[0].path
    if not names:
        raise UserError(f"{where}: has no column besides document_id and start; add one with scores")
    for name in names:
        try:
            check_identifier(name)
        except ValueError:
            raise UserError(
                f"{where}: {quoted(name)} cannot be a column name; rename it, or omit it in --columns"
            ) from None
        if is_reserved(name):
            raise UserError(f"{where}: column '{name}' is reserved by wmtp; rename it, or omit it in --columns")
    for file in files:
        file.type_of("document_id")
        if extra := [name for name in file.types if name not in (*names, *KEYS)] if not wanted else []:
            raise UserError(f"{file.path}: has a column {quoted(extra[0])} that {where} lacks; choose with --columns")
    return {name: kind_of_column(name, files) for name in names}


def kind_of_column(name: str, files: Sequence[FileTypes]) -> Kind:
    """The kind of a column, which all files must agree on. A column of nulls in JSON agrees with any kind.

    Raises:
        UserError: they do not agree, or the type is none of those.
    """
    kinds: dict[Kind, Location] = {}
    for file in files:
        found = file.type_of(name)
        if pa.types.is_null(found):
            continue
        kind = kind_of_type(found)
        if kind is None:
            raise UserError(
                f"{file.path}: column '{name}' holds {quoted(str(found))}, not a list of numbers, a number or a string "
                "in each row; convert it, or omit it in --columns"
            )
        kinds.setdefault(kind, file.path)
    if len(kinds) != 1:
        what = " and ".join(f"a {kind} in {path}" for kind, path in kinds.items()) or "no value in its first rows"
        raise UserError(f"{files[0].path}: column '{name}' is {what}; convert it, or omit it in --columns")
    return next(iter(kinds))


def kind_of_type(found: pa.DataType) -> Kind | None:
    """The kind of a column of this Arrow type; None if it cannot be imported."""
    types = pa.types
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_integer(found) or types.is_floating(found):
        return "number"
    if types.is_string(found) or types.is_large_string(found) or types.is_timestamp(found) or types.is_date(found):
        return "label"  # Arrow takes some strings of JSON for times
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        inner = found.value_type
        return "score" if types.is_integer(inner) or types.is_floating(inner) or types.is_null(inner) else None
    return None


def read_scores(files: Sequence[FileTypes], kinds: Mapping[str, Kind], tokens: int) -> ScoreRows:
    """Read all rows of the files.

    Args:
        files: the files, in reading order.
        kinds: columns to read, from `choose_columns`.
        tokens: tokens of the shard set, which bound the numbers of a column.

    Raises:
        UserError: a file cannot be read, a value has the wrong type or is infinite, or there are too many numbers.
    """
    collected = Collected(kinds, 2 * tokens + EXCESS_NUMBERS)
    for index, file in enumerate(files):
        names = [name for name in (*KEYS, *kinds) if name in file.types]
        first = 0
        with reading(file.path):
            is_parquet = file.path.suffix.lower() == ".parquet"
            batches = read_parquet(file.path, names) if is_parquet else read_json(file, names, kinds)
            for table in batches:
                table.validate(full=True)
                collected.add(file.path, index, first, table)
                first += table.num_rows
    return collected.rows([file.path for file in files])


def read_parquet(path: Location, names: list[str]) -> Iterator[pa.Table]:
    """Tables of at most `BATCH_ROWS` rows."""
    with path.open("rb") as source, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            yield pa.Table.from_batches([batch])


def read_json(file: FileTypes, names: list[str], kinds: Mapping[str, Kind]) -> Iterator[pa.Table]:
    """Tables of about `BATCH_BYTES` bytes of JSON.

    Raises:
        ValueError: a line is no object with values of these types; the message names the row.
    """
    id_type = pa.int64() if pa.types.is_integer(file.types["document_id"]) else pa.string()
    types = {"document_id": id_type, "start": pa.int64(), **{name: JSON_TYPES[kind] for name, kind in kinds.items()}}
    schema = pa.schema([(name, types[name]) for name in names])
    known = set(file.types) == set(names)
    first = 0
    with open_lines(file.path) as source:
        while lines := source.readlines(BATCH_BYTES):
            yield parse_json(lines, first, schema, "error" if known else "ignore")
            first += len(lines)


def open_lines(path: Location) -> io.BufferedReader:
    """Open a file for `readlines` with a size, which files of stores lack."""
    # They have the required `readinto`, but their type does not declare it.
    return io.BufferedReader(path.open("rb"), 1 << 20)  # type: ignore[arg-type]


def parse_json(
    lines: list[bytes],
    first: int,
    schema: pa.Schema | None = None,
    unexpected: Literal["infer", "error", "ignore"] = "infer",
) -> pa.Table:
    """Parse JSON Lines whose first line is row `first`. They are one block, so that Arrow counts rows from there.

    Raises:
        ValueError: a line is no object with values of the types; the message names the row.
    """
    content = b"".join(lines)
    try:
        table = pa.json.read_json(
            pa.BufferReader(content),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
        )
    except pa.ArrowInvalid as error:
        place = re.search(r"in row (\d+)", str(error))
        row = f"row {first + int(place[1]) + 1:,}" if place else f"from row {first + 1:,} on"
        reason = re.sub(r"\.? in row \d+", "", first_line(error))
        raise ValueError(f"{row}: {reason}") from error
    if table.num_rows != len(lines):
        raise ValueError(f"from row {first + 1:,} on: not one object in each line, or a blank line")
    return table


@dataclass
class Collected:
    """Rows of the files read so far, by batch. `most_numbers` bounds the numbers of a column."""

    kinds: Mapping[str, Kind]
    most_numbers: int
    keys: list[pl.DataFrame] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, path: Location, file: int, first: int, table: pa.Table) -> None:
        """Add a batch of rows.

        Args:
            path: the file.
            file: its index.
            first: number of the first row.
            table: the rows.

        Raises:
            UserError: a value cannot be imported.
        """
        self.keys.append(read_keys(path, file, first, table))
        for name, kind in self.kinds.items():
            column = table[name].combine_chunks()
            if kind == "label":
                self.columns.setdefault(name, []).append(decode(column).cast(pa.string()))
                continue
            where = f"{path}: row {{row:,}}: '{name}'"
            if kind == "number":
                with np.errstate(over="ignore"):
                    values = numbers_of(column).astype(np.float32)
                if (wrong := np.flatnonzero(np.isinf(values))).size:
                    raise UserError(f"{where.format(row=first + wrong[0] + 1)} is infinite in float32; correct it")
                self.columns.setdefault(name, []).append(values)
                continue
            lists = lists_of(column)
            if (wrong := np.flatnonzero(np.isinf(lists.values))).size:
                row = int(np.searchsorted(lists.first, wrong[0], side="right")) - 1
                raise UserError(
                    f"{where.format(row=first + row + 1)} has a value that is infinite or beyond float16 (65,504); "
                    "scale the column, or write null for 'no score'"
                )
            lists.first += self.numbers.get(name, 0)
            self.numbers[name] = self.numbers.get(name, 0) + len(lists.values)
            if self.numbers[name] > self.most_numbers:
                raise UserError(f"{path}: '{name}' has many more numbers than the set has tokens; check --scores")
            self.columns.setdefault(name, []).append(lists)

    def rows(self, files: list[Location]) -> ScoreRows:
        """All rows.

        Raises:
            UserError: there are none.
        """
        if not self.keys:
            raise UserError(f"{files[0]}: the score files have no rows; check --scores")
        rows = ScoreRows(files, pl.concat(self.keys), {}, {}, {})
        for name, kind in self.kinds.items():
            parts = self.columns.pop(name)
            if kind == "score":
                fields = ("values", "first", "lengths")
                rows.lists[name] = Lists(*(np.concatenate([getattr(part, key) for part in parts]) for key in fields))
            elif kind == "number":
                rows.numbers[name] = np.concatenate(parts)
            else:
                rows.labels[name] = pa.chunked_array(parts, pa.string())
        return rows


def read_keys(path: Location, file: int, first: int, table: pa.Table) -> pl.DataFrame:
    """The keys of a batch, as in `ScoreRows`.

    Raises:
        UserError: a row has no id, or an id or a start has the wrong type.
    """
    ids = decode(table["document_id"].combine_chunks())
    if pa.types.is_floating(ids.type) or pa.types.is_boolean(ids.type) or pa.types.is_nested(ids.type):
        raise UserError(f"{path}: 'document_id' should be a string; it is {ids.type}")
    if ids.null_count:
        row = first + pc.index(ids.is_null(), True).as_py() + 1
        raise UserError(f"{path}: row {row:,}: has no document_id; add it")
    rows = table.num_rows
    starts = table["start"] if "start" in table.column_names else pa.nulls(rows, pa.int64())
    if not (pa.types.is_integer(starts.type) or pa.types.is_null(starts.type)):
        raise UserError(f"{path}: 'start' should be an integer, the index of a token; it is {starts.type}")
    return pl.DataFrame(
        {
            "document_id": pl.Series(ids.cast(pa.string()), dtype=pl.String),
            "start": pl.Series(starts.cast(pa.int64()), dtype=pl.Int64),
            "file": np.full(rows, file, np.int64),
            "row": np.arange(first, first + rows),
        }
    )


def decode(column: pa.Array) -> pa.Array:
    """A column without dictionary."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def numbers_of(column: pa.Array) -> np.ndarray:
    """Numbers as float64, NaN where they are null."""
    return pc.fill_null(decode(column).cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)


def lists_of(column: pa.Array) -> Lists:
    """A column of lists of numbers. Values beyond the range of float16 become infinite."""
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    with np.errstate(over="ignore"):
        values = numbers_of(pc.list_flatten(column)).astype(np.float16)
    present = np.maximum(lengths, 0)
    return Lists(values, np.cumsum(present) - present, lengths)
