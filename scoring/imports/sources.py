"""Sources of score rows, files or data in memory, and the choice of their columns.

A row has a `document_id`, optionally a `start`, and columns with a list of numbers, a number or a string. Nothing in a
source is trusted.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.configs.common import MOST_NAME, check_identifier, is_reserved
from weighted_mtp.schemas.errors import UserError, first_line, lacks_memory
from weighted_mtp.schemas.shard_set.manifest import MOST_COLUMNS
from weighted_mtp.schemas.shard_set.shards import is_text
from weighted_mtp.schemas.storage.compression import DAMAGE

Kind = Literal["score", "number", "label"]
KEYS = ("document_id", "start")
BATCH_ROWS = 256
SHOWN = 60
"""Most characters of an id or a name in a message."""
SHOWN_REASON = 200


class RowBatch(NamedTuple):
    """Some rows of a source, and the number of each in the source, from 0: int64 [rows]."""

    numbers: np.ndarray
    table: pa.Table


class ColumnSize(NamedTuple):
    """Size of a column: its values, with one for an empty or missing list, and its bytes as encoded."""

    values: int
    bytes: int


@dataclass(frozen=True)
class ScoreSource(ABC):
    """A source of score rows.

    Attributes:
        name: what messages call it.
        types: Arrow types of its columns. JSON Lines and iterables have those of their first rows.
    """

    name: str
    types: Mapping[str, pa.DataType]

    def type_of(self, column: str) -> pa.DataType:
        """The type of a column.

        Raises:
            UserError: there is no such column.
        """
        if column not in self.types:
            raise UserError(f"{self.name}: has no column {quoted(column)}; add it")
        return self.types[column]

    def place(self, number: int) -> str:
        """The place of a row, for messages."""
        return f"{self.name}: row {number + 1:,}"

    def sizes(self) -> Mapping[str, ColumnSize]:
        """Sizes of columns by name, where the source knows them before its rows are read.

        Raises:
            UserError: the source is damaged.
        """
        return {}

    @abstractmethod
    def batches(self, kinds: Mapping[str, Kind]) -> Iterator[RowBatch]:
        """The rows in order, with the keys and these columns. They can be read once.

        Raises:
            UserError: the source is damaged, or a value has the wrong type.
        """


def quoted(text: str) -> str:
    """Foreign text for a message: truncated, quoted, and without control characters."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


@contextmanager
def damage_reported(name: str) -> Iterator[None]:
    """Turn damage of a source into a UserError. Arrow also raises errors of the system for damaged Parquet."""
    try:
        yield
    except DAMAGE as error:
        of_system = isinstance(error, OSError) and (error.errno is not None or error.__cause__)  # or of a store
        if of_system or lacks_memory(error):
            raise
        reason = repr(first_line(error).rstrip(".")[:SHOWN_REASON])[1:-1]
        raise UserError(f"{name}: cannot be read ({reason}); correct it or leave it out") from error


def choose_columns(sources: Sequence[ScoreSource], wanted: Sequence[str]) -> dict[str, Kind]:
    """The columns to import and their kinds.

    Args:
        sources: all sources.
        wanted: names given by the user; none means all columns except the unnamed index of pandas.

    Raises:
        UserError: a column is missing in a source, its name or type cannot be used, or there are too many.
    """
    names = dict.fromkeys(wanted or (name for name in sources[0].types if not is_key(name)))
    where = sources[0].name
    if not names:
        raise UserError(f"{where}: has no column besides document_id and start; add one with scores")
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{where}: has {len(names):,} columns to add; choose at most {MOST_COLUMNS:,} with --columns")
    for name in names:
        try:
            check_identifier(name)
        except ValueError:
            raise UserError(
                f"{where}: {quoted(name)} cannot be a column name (at most {MOST_NAME} letters, digits and "
                "underscores); rename it, or choose other columns"
            ) from None
        if is_reserved(name):
            raise UserError(f"{where}: column '{name}' is reserved by wmtp; rename it, or choose other columns")
    for source in sources:
        source.type_of("document_id")
        if not wanted:
            check_same_columns(sources[0], source)
    return {name: kind_of_column(name, sources) for name in names}


def check_same_columns(one: ScoreSource, other: ScoreSource) -> None:
    """Raise UserError unless two sources have the same columns besides keys."""
    for holder, lacking in ((one, other), (other, one)):
        for name in holder.types:
            if name not in lacking.types and not is_key(name):
                raise UserError(
                    f"{holder.name}: has a column {quoted(name)} that {lacking.name} lacks; import one file after the "
                    "other, or choose columns that all files have"
                )


def is_key(name: str) -> bool:
    """Whether a column only identifies rows: a key, or the unnamed index of a pandas table."""
    return name in KEYS or re.fullmatch(r"__index_level_\d+__", name) is not None


def kind_of_column(name: str, sources: Sequence[ScoreSource]) -> Kind:
    """The kind of a column, which all sources must agree on. A column of nulls agrees with any kind.

    Raises:
        UserError: they do not agree, or the type is none of those.
    """
    kinds: dict[Kind, str] = {}
    for source in sources:
        found = source.type_of(name)
        if pa.types.is_null(found):
            continue
        kind = kind_of_type(found)
        if kind is None:
            raise UserError(
                f"{source.name}: column '{name}' holds {quoted(str(found))}, not a list of numbers, a number or a "
                "string in each row; convert it, or choose other columns"
            )
        kinds.setdefault(kind, source.name)
    if not kinds:
        raise UserError(
            f"{sources[0].name}: column '{name}' has no value in the first rows; move a row with one to the start, or "
            "choose other columns"
        )
    if len(kinds) > 1:
        what = " and ".join(f"a {kind} in {place}" for kind, place in kinds.items())
        raise UserError(f"{sources[0].name}: column '{name}' is {what}; convert it, or choose other columns")
    return next(iter(kinds))


def kind_of_type(found: pa.DataType) -> Kind | None:
    """The kind of a column of this Arrow type; None if it cannot be imported."""
    types = pa.types
    if types.is_dictionary(found):
        found = found.value_type
    if is_numeric(found):
        return "number"
    if is_text(found):
        return "label"
    if types.is_timestamp(found) or types.is_date(found):
        return "label"  # Arrow takes some strings of JSON for times
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        return "score" if is_numeric(found.value_type) or types.is_null(found.value_type) else None
    return None


def is_numeric(found: pa.DataType) -> bool:
    """Whether a type is one of numbers. DuckDB writes literals and sums as decimals."""
    return pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
