"""Collecting score rows in memory, as arrays.

Lists become float16 arrays batch by batch, because Python lists of a corpus would not fit.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shards import MOST_TEXT_BYTES, is_text, text_sizes
from weighted_mtp.scoring.imports.sources import Kind, RowBatch, ScoreSource, damage_reported, quoted

EXCESS_NUMBERS = 1 << 20
"""Reading stops at this many numbers of a column, or rows, more than twice the tokens of the set."""
TEXT_BYTES = 64
"""Most bytes of ids, or of labels of a column, for each number that a column of scores may have."""


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
    """The rows of all sources.

    Attributes:
        sources: the sources, in reading order.
        keys: `document_id` (string), `start` (int64 or null), and index of the `source` and number of the `row` in it.
        lists: columns of scores.
        numbers: columns of numbers, float32 [rows], NaN where a value is missing.
        labels: columns of strings, null where a value is missing.
    """

    sources: Sequence[ScoreSource]
    keys: pl.DataFrame
    lists: dict[str, Lists]
    numbers: dict[str, np.ndarray]
    labels: dict[str, pa.ChunkedArray]

    def describe(self, row: int) -> str:
        """The place of a row, for messages."""
        document, _, source, number = self.keys.row(row)
        return f"{self.sources[source].place(number)} (document {quoted(document)})"


def read_rows(sources: Sequence[ScoreSource], kinds: Mapping[str, Kind], tokens: int) -> ScoreRows:
    """Read all rows of the sources.

    Args:
        sources: the sources, in reading order.
        kinds: columns to read, from `choose_columns`.
        tokens: tokens of the shard set, which bound the size of a column.

    Raises:
        UserError: a source cannot be read, a value has the wrong type or is infinite, or there are too many values.
    """
    collected = Collected(sources, kinds, 2 * tokens + EXCESS_NUMBERS)
    for index, source in enumerate(sources):
        collected.check_sizes(index)
        for batch in source.batches(kinds):
            with damage_reported(source.name):
                batch.table.validate(full=True)
                collected.add(index, batch)
    return collected.rows()


@dataclass
class Collected:
    """The rows read so far, by batch. `most_numbers` bounds the size of the columns."""

    sources: Sequence[ScoreSource]
    kinds: Mapping[str, Kind]
    most_numbers: int
    keys: list[pl.DataFrame] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)
    """Numbers of each column of scores, bytes of ids and labels, and rows under the empty name."""

    def check_sizes(self, source: int) -> None:
        """Check what the source with this index says of its sizes, before its rows are read.

        Raises:
            UserError: a column is too large.
        """
        sizes = self.sources[source].sizes()
        for name in ("document_id", *self.kinds):
            if name in sizes and (
                sizes[name].values > 2 * self.most_numbers or sizes[name].bytes > TEXT_BYTES * self.most_numbers
            ):
                raise self._too_large(source, name)

    def add(self, source: int, batch: RowBatch) -> None:
        """Add a batch of rows of the source with this index.

        Raises:
            UserError: a value cannot be imported, or there are too many.
        """
        self._count(source, "", batch.table.num_rows, self.most_numbers)
        self.keys.append(self._keys(source, batch))
        for name, kind in self.kinds.items():
            column = batch.table[name].combine_chunks()
            values: Any
            if kind == "label":
                values = self._texts(source, batch, name, column)
                self._count(source, name, values.nbytes, TEXT_BYTES * self.most_numbers)
            elif kind == "number":
                with np.errstate(over="ignore"):
                    values = numbers_of(column).astype(np.float32)
                for row in np.flatnonzero(np.isinf(values))[:1]:
                    raise UserError(f"{self._place(source, batch, row)}: '{name}' is infinite in float32; correct it")
            else:
                values = lists_of(column)
                for wrong in np.flatnonzero(np.isinf(values.values))[:1]:
                    row = int(np.searchsorted(values.first, wrong, side="right")) - 1
                    raise UserError(
                        f"{self._place(source, batch, row)}: '{name}' has a value that is infinite or beyond float16 "
                        "(65,504); scale the column, or give null or NaN for 'no score'"
                    )
                values.first += self.sizes[name]
                self._count(source, name, len(values.values), self.most_numbers)
            self.columns.setdefault(name, []).append(values)

    def rows(self) -> ScoreRows:
        """All rows.

        Raises:
            UserError: there are none.
        """
        if not self.sizes[""]:
            raise UserError(f"{self.sources[0].name}: has no rows; give at least one")
        rows = ScoreRows(self.sources, pl.concat(self.keys), {}, {}, {})
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

    def _keys(self, source: int, batch: RowBatch) -> pl.DataFrame:
        """The keys of a batch, as in `ScoreRows`.

        Raises:
            UserError: a row has no id, or an id or a start has the wrong type.
        """
        name, table = self.sources[source].name, batch.table
        ids = self._texts(source, batch, "document_id", table["document_id"].combine_chunks())
        if ids.null_count:
            row = pc.index(ids.is_null(), True).as_py()
            raise UserError(f"{self._place(source, batch, row)}: has no document_id; add it")
        self._count(source, "document_id", ids.nbytes, TEXT_BYTES * self.most_numbers)
        starts = table["start"] if "start" in table.column_names else pa.nulls(table.num_rows, pa.int64())
        if not (pa.types.is_integer(starts.type) or pa.types.is_null(starts.type)):
            raise UserError(f"{name}: 'start' should be an integer, the index of a token; it is {starts.type}")
        return pl.DataFrame(
            {
                "document_id": pl.Series(ids, dtype=pl.String),
                "start": pl.Series(starts.cast(pa.int64()), dtype=pl.Int64),
                "source": np.full(table.num_rows, source, np.int64),
                "row": batch.numbers,
            }
        )

    def _texts(self, source: int, batch: RowBatch, name: str, column: pa.Array) -> pa.Array:
        """A column of strings; other values, such as integers and dates, become strings.

        Raises:
            UserError: it has another type, or a string is too long.
        """
        kind = column.type
        if is_text(kind):
            for row in np.flatnonzero(text_sizes(column) > MOST_TEXT_BYTES)[:1]:
                place = self._place(source, batch, row)
                raise UserError(f"{place}: '{name}' is longer than {MOST_TEXT_BYTES:,} bytes; shorten it")
        elif pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_nested(kind):
            raise UserError(f"{self.sources[source].name}: '{name}' should be a string; it is {kind}")
        return decode(column).cast(pa.string())

    def _place(self, source: int, batch: RowBatch, row: int) -> str:
        return self.sources[source].place(int(batch.numbers[row]))

    def _count(self, source: int, name: str, size: int, most: int) -> None:
        self.sizes[name] += size
        if self.sizes[name] > most:
            raise self._too_large(source, name)

    def _too_large(self, source: int, name: str) -> UserError:
        what = f"'{name}' is much larger" if name else "has many more rows"
        return UserError(
            f"{self.sources[source].name}: {what} than the set allows; check that the scores are of this corpus"
        )


def decode(column: pa.Array) -> pa.Array:
    """A column without dictionary."""
    if not pa.types.is_dictionary(column.type):
        return column
    values = column.dictionary
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())  # Arrow cannot take from views
    return values.take(column.indices)


def numbers_of(column: pa.Array) -> np.ndarray:
    """Numbers as float64, NaN where they are null."""
    return pc.fill_null(decode(column).cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)


def lists_of(column: pa.Array) -> Lists:
    """A column of lists of numbers. Values beyond the range of float16 become infinite."""
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    with np.errstate(over="ignore"):
        values = numbers_of(pc.list_flatten(column)).astype(np.float16)
    values[np.isnan(values)] = np.nan  # in one form, for digests
    present = np.maximum(lengths, 0)
    return Lists(values, np.cumsum(present) - present, lengths)
