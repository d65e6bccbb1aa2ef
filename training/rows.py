"""Packed training rows, passed from the loader through weighting to the training step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORED = -100
"""Label of a token that is not a target, as in torch and transformers."""


class Rows(NamedTuple):
    """B packed rows of L tokens.

    Attributes:
        input_ids: (B, L) int32.
        position_ids: (B, L) int32, restarting at 0 in every document; padding tokens are documents of one token.
        weights: (B, L) float32; (B, L, components) if weights are computed from the batch, NaN where a token has no
            score.
        tokens: (B,) int64, tokens of each row without padding.
        silent: (B,) int64, number of documents of at least two tokens in which no target has weight (or all
            components).
        sources: (B,) object, a number for each document of a row, in order, without padding: in training that of its
            shard, which the loader's `files` maps to a path.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    silent: np.ndarray
    sources: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Rows":
        """Copies of the rows at `index`; views would keep all rows in memory."""
        return Rows(*(np.array(values[index]) for values in self))

    @staticmethod
    def concatenate(batches: "Sequence[Rows]") -> "Rows":
        """Copies of the rows of all batches, in order."""
        return Rows(*(np.concatenate(values) for values in zip(*batches, strict=True)))


def silent_documents(signal: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """Number of documents of at least two tokens without a target with signal, (B,) int64.

    Args:
        signal: (B, L) bool.
        position_ids: (B, L), restarting at 0 in each document; padding is documents of one token.
    """
    targets = position_ids.ravel() > 0
    starts = np.flatnonzero(~targets)
    lengths = np.diff(starts, append=targets.size)
    silent = (lengths > 1) & ~np.logical_or.reduceat(signal.ravel() & targets, starts)
    return np.bincount(starts // position_ids.shape[1], silent, len(position_ids)).astype(np.int64)
