"""Extracts the scored tokens of a row group for the evaluation of expressions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.training.weighting.expressions import Tokens
from weighted_mtp.training.weighting.segments import ArraySegments

EXPONENT = np.uint16(0x7C00)
"""Exponent bits of a float16; all are set in infinities and NaN."""


class ScoredTokens(NamedTuple):
    """The tokens of a table that have a finite value in all score columns that were read.

    Attributes:
        tokens: these N tokens.
        mask: (T,) bool, which tokens of the table they are.
        counts: (S,) how many of them each sequence has.
    """

    tokens: Tokens
    mask: np.ndarray
    counts: np.ndarray

    def scatter(self, values: np.ndarray | float, missing: float) -> np.ndarray:
        """Values (N,) of the scored tokens as (T,) float32, with `missing` for all other tokens."""
        result = np.full(len(self.mask), missing, dtype=np.float32)
        result[self.mask] = values
        return result


def scored_tokens(table: pa.Table, names: Sequence[str]) -> ScoredTokens:
    """The tokens that have a finite value in every score column among `names`.

    If none of the columns is a score column, these are all tokens except the first of each sequence, which is never
    predicted.
    """
    lengths = list_lengths(table["input_ids"])
    starts = np.cumsum(lengths) - lengths
    scores: dict[str, np.ndarray] = {}  # (T,)
    numbers: dict[str, np.ndarray] = {}  # (S,)
    labels: dict[str, np.ndarray] = {}  # (S,)
    for name in names:
        kind = table.schema.field(name).type
        if pa.types.is_list(kind):
            scores[name] = flat_values(table[name])
        else:
            values = table[name].to_numpy()
            (labels if pa.types.is_string(kind) else numbers)[name] = values
    mask = np.ones(int(lengths.sum()), dtype=bool)
    if not scores:
        mask[starts] = False
    for values in scores.values():
        mask &= (values.view(np.uint16) & EXPONENT) != EXPONENT  # np.isfinite is slow for float16
    counts = np.add.reduceat(mask, starts, dtype=np.int64)
    columns = {name: values[mask] for name, values in scores.items()}
    columns |= {name: np.repeat(values.astype(np.float32), counts) for name, values in numbers.items()}
    segments = {"sequence": ArraySegments(counts)}
    return ScoredTokens(Tokens(columns, segments, labels), mask, counts)
