"""Extracts the scored tokens of a row group for the evaluation of expressions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.training.weighting.expressions import Tokens
from weighted_mtp.training.weighting.segments import ArraySegments


class ScoredTokens(NamedTuple):
    """The tokens of a table with finite values in all score columns read.

    Attributes:
        tokens: the N scored tokens.
        mask: (T,) bool, whether each token of the table is scored.
        counts: (S,) scored tokens per sequence.
    """

    tokens: Tokens
    mask: np.ndarray
    counts: np.ndarray

    def scatter(self, values: np.ndarray | float, missing: float) -> np.ndarray:
        """Expand values (N,) of the scored tokens to (T,) float32, with `missing` for all other tokens."""
        result = np.full(len(self.mask), missing, dtype=np.float32)
        result[self.mask] = values
        return result


def scored_tokens(table: pa.Table, names: Sequence[str]) -> ScoredTokens:
    """The tokens with finite values in every score column among `names`.

    Without score columns, all tokens except the first of each sequence, which is never predicted.
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
        mask &= np.isfinite(values)
    counts = np.add.reduceat(mask, starts, dtype=np.int64)
    columns = {name: values[mask] for name, values in scores.items()}
    columns |= {name: np.repeat(values.astype(np.float32), counts) for name, values in numbers.items()}
    segments = {"sequence": ArraySegments(counts)}
    return ScoredTokens(Tokens(columns, segments, labels), mask, counts)
