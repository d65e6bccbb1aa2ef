"""Row groups of a shard set as the tokens that expressions are evaluated on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.training.weighting.expressions import Tokens
from weighted_mtp.training.weighting.segments import ArraySegments

EXPONENT = np.uint16(0x7C00)
"""The exponent's bits of a float16: all set in infinities and NaN."""


class Scored(NamedTuple):
    """The tokens of a table that have all scores that were asked for.

    Attributes:
        tokens: these tokens.
        mask: (T,) bool, which of all tokens they are.
        counts: (S,) how many of them each sequence has.
    """

    tokens: Tokens
    mask: np.ndarray
    counts: np.ndarray

    def spread(self, values: np.ndarray | float, missing: float) -> np.ndarray:
        """Values (N,) of the scored tokens as float32 (T,), `missing` for the others."""
        result = np.full(len(self.mask), missing, dtype=np.float32)
        result[self.mask] = values
        return result


def scored_tokens(table: pa.Table, names: Sequence[str]) -> Scored:
    """The tokens that have a finite score in all score columns among `names`.

    Where there are only columns of sequences, these are all tokens but the first of each sequence, which no model
    predicts.
    """
    lengths = list_lengths(table["input_ids"])
    starts = np.cumsum(lengths) - lengths
    scores: dict[str, np.ndarray] = {}
    of_sequences: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name in names:
        kind = table.schema.field(name).type
        if pa.types.is_list(kind):
            scores[name] = flat_values(table[name])
        else:
            values = table[name].to_numpy()
            (labels if pa.types.is_string(kind) else of_sequences)[name] = values
    mask = np.ones(int(lengths.sum()), dtype=bool)
    if not scores:
        mask[starts] = False
    for values in scores.values():
        mask &= (values.view(np.uint16) & EXPONENT) != EXPONENT  # isfinite, which is slow for float16
    counts = np.add.reduceat(mask, starts, dtype=np.int64)
    columns = {name: values[mask] for name, values in scores.items()}
    columns |= {name: np.repeat(values.astype(np.float32), counts) for name, values in of_sequences.items()}
    segments = {"sequence": ArraySegments(counts)}
    return Scored(Tokens(columns, segments, labels), mask, counts)
