"""Score rows in memory: a table of any library that speaks Arrow, or an iterable of mappings."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.scoring.imports.sources import BATCH_ROWS, KEYS, Kind, RowBatch, ScoreSource, damage_reported, quoted

NAME = "rows"
BATCH_NUMBERS = 1 << 20
"""A batch of mappings ends at this many numbers in lists."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowsInMemory(ScoreSource):
    """Score rows in memory. In messages, a row is `rows[n]`, counted from 0."""

    def place(self, number: int) -> str:
        """The place of a row, for messages."""
        return f"{NAME}[{number}]"


@dataclass(frozen=True)
class ArrowRows(RowsInMemory):
    """A table of any library, as a stream of Arrow batches."""

    reader: pa.RecordBatchReader

    def batches(self, kinds: Mapping[str, Kind]) -> Iterator[RowBatch]:
        """Batches of at most `BATCH_ROWS` rows."""
        names = [name for name in (*KEYS, *kinds) if name in self.types]
        number = 0
        with damage_reported(self.name):
            for batch in self.reader:
                for first in range(0, batch.num_rows, BATCH_ROWS):
                    part = pa.Table.from_batches([batch.slice(first, BATCH_ROWS)]).select(names)
                    yield RowBatch(np.arange(number, number + part.num_rows), part)
                    number += part.num_rows


@dataclass(frozen=True)
class MappingRows(RowsInMemory):
    """An iterable of mappings. If it is `exact`, no row has a field that the first rows lack."""

    rows: Iterator[Row]
    exact: bool

    def batches(self, kinds: Mapping[str, Kind]) -> Iterator[RowBatch]:
        """Batches of at most `BATCH_ROWS` rows and about `BATCH_NUMBERS` numbers."""
        names = [name for name in (*KEYS, *kinds) if name in self.types]
        converters = {name: CONVERTERS[kinds.get(name, name)] for name in names}
        held: list[list[Any]] = []
        first = size = 0
        for number, row in enumerate(self.rows):
            if self.exact:
                self._check_fields(number, row)
            values = [self._convert(number, name, row.get(name), convert) for name, convert in converters.items()]
            held.append(values)
            size += sum(len(value) for value in values if isinstance(value, np.ndarray))
            if len(held) == BATCH_ROWS or size >= BATCH_NUMBERS:
                yield RowBatch(np.arange(first, number + 1), arrow_table(names, held, kinds))
                held, first, size = [], number + 1, 0
        if held:
            yield RowBatch(np.arange(first, first + len(held)), arrow_table(names, held, kinds))

    def _check_fields(self, number: int, row: Row) -> None:
        for name in row:
            if name not in self.types:
                raise UserError(
                    f"{self.place(number)}: has a field {quoted(str(name))} that the first rows lack; "
                    "give it earlier, or choose the columns"
                )

    def _convert(self, number: int, name: str, value: Any, convert: Callable[[Any], Any]) -> Any:
        try:
            value = plain(value)
            return None if value is None else convert(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.place(number)}: '{name}' {first_line(error)}; correct it") from error


def open_rows(rows: Any, columns: Sequence[str]) -> RowsInMemory:
    """Names and types of the columns of rows in memory.

    Args:
        rows: an object with `__arrow_c_stream__`, or an iterable of mappings from names to values.
        columns: names given by the user; none means all columns.

    Raises:
        UserError: `rows` is neither, or a value in its first rows cannot be imported.
    """
    if hasattr(rows, "__arrow_c_stream__"):
        with damage_reported(NAME):
            reader = pa.RecordBatchReader.from_stream(rows)
            names = reader.schema.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
        return ArrowRows(NAME, dict(zip(names, reader.schema.types, strict=True)), reader)
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
        raise UserError(
            f"{NAME}: is of type {type(rows).__name__}; give a table of pyarrow, polars, pandas or DuckDB, or an "
            "iterable of dicts with 'document_id' and scores"
        )
    checked = check_rows(rows)
    head = list(islice(checked, BATCH_ROWS))
    types: dict[str, pa.DataType] = {}
    for number, row in enumerate(head):
        for name, value in row.items():
            if (not columns or name in (*KEYS, *columns)) and pa.types.is_null(types.get(name, pa.null())):
                types[name] = type_of_value(f"{NAME}[{number}]", name, plain(value))
    return MappingRows(NAME, types, chain(head, checked), exact=not columns)


def check_rows(rows: Iterable[Any]) -> Iterator[Row]:
    """The rows, which must be mappings.

    Raises:
        UserError: a row is none.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{NAME}[{number}]: is of type {type(row).__name__}; give a dict with 'document_id' and scores"
            )
        yield row


def type_of_value(place: str, name: Any, value: Any) -> pa.DataType:
    """The Arrow type of the column of a plain value. Keys have theirs; their values are checked later.

    Raises:
        UserError: the value is no list, number or string, or the name no string.
    """
    if not isinstance(name, str):
        raise UserError(f"{place}: has a field {quoted(str(name))}, which is no string; rename it")
    if name in KEYS:
        return ARROW_TYPES[name]
    if value is None:
        return pa.null()
    if isinstance(value, list | tuple | np.ndarray):
        return pa.list_(pa.float64())
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return pa.float64()
    raise UserError(
        f"{place}: '{name}' is of type {type(value).__name__}, not a list of numbers, a number or a string; "
        "convert it, or choose other columns"
    )


def plain(value: Any) -> Any:
    """A value as a NumPy array if it is an array or a tensor of any library, else as a Python value.

    Masked entries of an array become NaN.
    """
    if hasattr(value, "detach"):  # a tensor of torch: on any device, and also of a dtype that NumPy lacks
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
    if not hasattr(value, "__array__"):
        return value
    array = np.ma.filled(value.astype(np.float64), np.nan) if np.ma.isMaskedArray(value) else np.asarray(value)
    return array if array.ndim else array.item()


def to_list(value: Any) -> np.ndarray:
    """Numbers as float64 [numbers].

    Raises:
        ValueError: it is no list or array of numbers with one dimension; what it is.
    """
    if isinstance(value, list | tuple):
        return np.array([math.nan if entry is None else to_number(entry, "has a value") for entry in value], np.float64)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"is of type {type(value).__name__}, not a list of numbers")
    if value.ndim != 1:
        raise ValueError(f"has {value.ndim} dimensions, not 1")
    if value.dtype.kind not in "iuf":
        raise ValueError(f"is an array of {value.dtype}, not of numbers")
    return value.astype(np.float64)


def to_number(value: Any, what: str = "is") -> float:
    """A number; infinite if it is too large for a float.

    Raises:
        ValueError: it is none; what it is.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{what} of type {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def to_text(value: Any) -> str:
    """A string.

    Raises:
        ValueError: it is none, or it has no form in UTF-8.
    """
    if not isinstance(value, str):
        raise ValueError(f"is of type {type(value).__name__}, not a string")
    value.encode()
    return value


def to_document_id(value: Any) -> str:
    """An id, which may be an integer.

    Raises:
        ValueError: it is neither an integer nor a string.
    """
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else to_text(value)


def to_start(value: Any) -> int:
    """The index of a token.

    Raises:
        ValueError: it is no integer, or too large or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is of type {type(value).__name__}, not an integer")
    if not 0 <= value < 1 << 63:
        raise ValueError("is no index of a token")
    return value


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "score": to_list,
    "number": to_number,
    "label": to_text,
    "document_id": to_document_id,
    "start": to_start,
}
"""Conversion of a plain value, by kind of column or name of key."""
ARROW_TYPES = {"number": pa.float64(), "label": pa.string(), "document_id": pa.string(), "start": pa.int64()}


def arrow_table(names: Sequence[str], rows: list[list[Any]], kinds: Mapping[str, Kind]) -> pa.Table:
    """A table of converted values: for each row the values of `names`, None where they are missing."""
    columns = {}
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        if kinds.get(name) == "score":
            missing = np.array([value is None for value in values])
            lists = [np.zeros(0) if value is None else value for value in values]
            offsets = np.cumsum([0, *map(len, lists)])
            columns[name] = pa.LargeListArray.from_arrays(offsets, np.concatenate(lists), mask=pa.array(missing))
        else:
            columns[name] = pa.array(values, ARROW_TYPES[kinds.get(name, name)])
    return pa.table(columns)
