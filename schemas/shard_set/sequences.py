"""Sequences of a shard set one at a time, as NumPy arrays."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths


class TokenSequence(NamedTuple):
    """A row of a shard set: T consecutive tokens of one document.

    Attributes:
        document_id: the document.
        start: index of the first token in its document.
        input_ids: (T,) int32.
        columns: the requested columns by name: scores (T,) float32, NaN where a token has none; numbers of the document
            as float, labels as str.
    """

    document_id: str
    start: int
    input_ids: np.ndarray
    columns: dict[str, Any]


def split_sequences(table: pa.Table, columns: Sequence[str]) -> Iterator[TokenSequence]:
    """Yield the rows of a table with `document_id`, `start`, `input_ids` and `columns`. Arrays are copies."""
    ends = np.cumsum(list_lengths(table["input_ids"]))
    flat: dict[str, np.ndarray] = {"input_ids": flat_values(table["input_ids"])}
    per_row: dict[str, list[Any]] = {name: table[name].to_pylist() for name in ("document_id", "start")}
    for name in columns:
        if pa.types.is_list(table[name].type):
            flat[name] = flat_values(table[name])
        else:
            per_row[name] = table[name].to_pylist()
    first = 0
    for row, end in enumerate(ends.tolist()):
        values = {name: all_rows[row] for name, all_rows in per_row.items()}
        values |= {name: tokens[first:end].copy() for name, tokens in flat.items()}
        yield TokenSequence(
            values["document_id"], values["start"], values["input_ids"], {name: values[name] for name in columns}
        )
        first = end
