"""Packed training rows: what the loader makes, weighting completes, and a training step takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Packed rows: `input_ids` (B, L) int32, `position_ids` (B, L) int32, `weights` (B, L) float32.

    Weights that wait for the batch are (B, L, parts): what they will be made of, NaN where a token has no score.
    `tokens` (B,) int64 counts the tokens of each row that are not padding. `silent` (B,) int64 counts its documents of
    at least two tokens that have no target with weight, or with all parts of it. `sources` (B,) object holds
    for each row the ascending numbers of the shards that its sequences come from; the loader's `files` names them.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    silent: np.ndarray
    sources: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Rows":
        """Copies of the rows at `index`, so that a few rows do not keep many in memory."""
        return Rows(*(np.array(values[index]) for values in self))

    @staticmethod
    def concatenate(parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, in order, as copies."""
        return Rows(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def silent_documents(signal: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """How many documents of at least two tokens have no target with signal, (B,) int64.

    Args:
        signal: (B, L) bool.
        position_ids: (B, L), restarting at 0 in each document; padding is documents of one token.
    """
    targets = position_ids.ravel() > 0
    starts = np.flatnonzero(~targets)
    lengths = np.diff(starts, append=targets.size)
    silent = (lengths > 1) & ~np.logical_or.reduceat(signal.ravel() & targets, starts)
    return np.bincount(starts // position_ids.shape[1], silent, len(position_ids)).astype(np.int64)
