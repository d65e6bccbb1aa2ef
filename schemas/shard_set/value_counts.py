"""Exact statistics of a score column in bounded memory.

A float16 has 65,536 bit patterns, so their counts describe the values of a column of any length completely. The counts
of a set are the sums of the counts of its shards. They give the exact mean and any quantile of the values, or of any
function of them, so corpus-wide thresholds require no pass over the data.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from weighted_mtp.schemas.shard_set.rounding import FLOAT16_VALUES, float16_bits

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.99, 1.0)
ADDED_AT_ONCE = 1 << 20
"""Values counted at once. Counting takes several times the memory of the values."""
ROW_BYTES = 20
"""Bytes of a row of the table in memory, without the name: an offset, a value, a count, and bits that mark nulls."""
MOST_METADATA_BYTES = 1 << 20
TABLE_SCHEMA = pa.schema({"column": pa.string(), "value": pa.float32(), "count": pa.int64()})


class ColumnStatistics(BaseModel):
    """Summary of one score column over a shard set. `missing` counts tokens without a finite score."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: Annotated[int, Field(ge=0)]
    missing: Annotated[int, Field(ge=0)]
    mean: float | None
    std: float | None
    quantiles: dict[str, float]


@dataclass
class ValueCounts:
    """Counts of float16 values, int64 [65536]: `counts[b]` is the count of the value with bit pattern `b`."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, dtype=np.int64))

    def add(self, values: np.ndarray) -> None:
        """Count float32 values [any length], rounded to float16. -0 counts as 0, and all NaN as one value."""
        for first in range(0, len(values), ADDED_AT_ONCE):
            some = values[first : first + ADDED_AT_ONCE]
            bits = float16_bits(np.where(np.isnan(some), np.float32(np.nan), some + np.float32(0)))
            self.counts += np.bincount(bits, minlength=1 << 16)

    def merge(self, other: "ValueCounts") -> None:
        """Add the counts of another part of the column."""
        self.counts += other.counts

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct finite values, ascending float64, and their counts, int64."""
        bits = np.flatnonzero(self.counts)
        values = FLOAT16_VALUES[bits].astype(np.float64)
        finite = np.isfinite(values)
        order = np.argsort(values[finite], kind="stable")
        return values[finite][order], self.counts[bits[finite]][order]

    @property
    def missing(self) -> int:
        """Tokens without a finite value."""
        return int(self.counts.sum() - self.distinct()[1].sum())

    def statistics(self) -> ColumnStatistics:
        """Count, mean, standard deviation and quantiles (inverse of the empirical distribution function)."""
        values, counts = self.distinct()
        if not len(values):
            return ColumnStatistics(count=0, missing=self.missing, mean=None, std=None, quantiles={})
        total = int(counts.sum())
        mean = float((values * counts).sum() / total)
        std = float(np.sqrt(((values - mean) ** 2 * counts).sum() / total))
        at = np.searchsorted(np.cumsum(counts), [max(1.0, np.ceil(q * total - 1e-9)) for q in QUANTILES])
        quantiles = {str(q): float(values[i]) for q, i in zip(QUANTILES, at, strict=True)}
        return ColumnStatistics(count=total, missing=self.missing, mean=mean, std=std, quantiles=quantiles)


def to_table(columns: dict[str, ValueCounts]) -> pa.Table:
    """All nonzero counts as one Arrow table (column, value, count)."""
    tables = []
    for name, column in columns.items():
        bits = np.flatnonzero(column.counts).astype(np.uint16)
        arrays = [pa.array([name] * len(bits), pa.string()), pa.array(FLOAT16_VALUES[bits])]
        tables.append(pa.table([*arrays, pa.array(column.counts[bits])], schema=TABLE_SCHEMA))
    return pa.concat_tables(tables) if tables else TABLE_SCHEMA.empty_table()


def most_table_bytes(columns: Collection[str]) -> int:
    """Largest size of a table with the counts of these columns, in an Arrow file."""
    return MOST_METADATA_BYTES + sum((1 << 16) * (ROW_BYTES + len(name)) for name in columns)


def from_table(table: pa.Table, columns: Collection[str] | None = None) -> dict[str, ValueCounts]:
    """Inverse of `to_table`. With `columns`, the result has exactly these; a column without rows has no values.

    Raises:
        ValueError: the table is damaged or has other columns, a count is not positive, or a value is no float16 or
            counted twice.
    """
    table.validate(full=True)  # Arrow trusts the offsets of strings in a file
    if any(column.null_count for column in table.columns):
        raise ValueError("a value or a count is null")
    names = table["column"].combine_chunks().dictionary_encode()
    present = names.dictionary.to_pylist()
    if columns is not None and not set(present) <= set(columns):
        raise ValueError("counts of other columns")
    values = table["value"].to_numpy()
    bits, counts = float16_bits(values), table["count"].to_numpy()
    if (counts <= 0).any() or not np.array_equal(FLOAT16_VALUES[bits], values, equal_nan=True):
        raise ValueError("impossible value counts")
    found = {name: ValueCounts() for name in (present if columns is None else columns)}
    indices = names.indices.to_numpy()
    order = np.argsort(indices, kind="stable")  # the rows of each column in turn
    ends = np.cumsum(np.bincount(indices, minlength=len(present))).tolist()
    for name, first, end in zip(present, [0, *ends], ends, strict=False):
        rows = order[first:end]
        found[name].counts[bits[rows]] = counts[rows]
        if np.count_nonzero(found[name].counts) != len(rows):
            raise ValueError("a value is counted twice")
    return found
