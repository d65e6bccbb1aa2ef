"""Sums, ranks and thresholds over segments of consecutive tokens: documents, or all of a batch.

Twice, for numpy where weights are known before training and for torch where they depend on its losses.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from weighted_mtp.schemas.shard_set.value_counts import FLOAT16_MAX


class Segments(Protocol):
    """Values (N,) that lie in S segments, one after the other; a segment may be empty.

    Arrays are ranked as float16 stores them, as if they were score columns, and summed in float64; tensors, which are
    current losses, as they are.

    Attributes:
        counts: (S,) values of each segment.
    """

    counts: Any

    def sums(self, values: Any) -> Any:
        """Sum of each segment (S,)."""
        ...

    def maxima(self, values: Any) -> Any:
        """Largest value of each segment (S,)."""
        ...

    def spread(self, values: Any) -> Any:
        """(N,): for each token the value of its segment, of (S,)."""
        ...

    def top(self, values: Any, fraction: float, of_magnitudes: float) -> Any:
        """Which values are among the `ceil(fraction * n)` largest of the n in their segment, (N,) bool.

        Ties at the threshold are kept. But 0 means no signal: it is never kept where values are magnitudes
        (`of_magnitudes` 1), nor in a segment of nothing else. A `fraction` of 1 keeps everything.
        """
        ...

    def rank(self, values: Any) -> Any:
        """Share of the values of the segment that are not larger (N,)."""
        ...


class ArraySegments:
    """Segments of numpy arrays; one sort of integers ranks the values of all of them."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; float64."""
        return self._reduce(np.add, values, np.dtype(np.float64))

    def maxima(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; 0 for an empty segment."""
        return self._reduce(np.maximum, values, values.dtype)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; float32."""
        return np.repeat(values.astype(np.float32), self.counts)

    def top(self, values: np.ndarray, fraction: float, of_magnitudes: float) -> np.ndarray:
        """See `Segments`."""
        if fraction == 1:
            return np.ones(len(values), dtype=bool)
        keys, first_keys = self._keys(values)
        ranked = np.sort(keys)
        kept = np.maximum(np.ceil(fraction * self.counts - 1e-9), 1).astype(np.int64)
        threshold = np.full(len(self.counts), np.iinfo(keys.dtype).max, dtype=keys.dtype)
        held = self.counts > 0
        zeros = first_keys + ZERO_KEY
        least, largest = ranked[(self.ends - self.counts)[held]], ranked[self.ends[held] - 1]
        held[held] = (least != zeros[held]) | (least != largest)
        threshold[held] = ranked[(self.ends - kept)[held]]
        if of_magnitudes:
            threshold = np.maximum(threshold, zeros + keys.dtype.type(1))
        return keys >= np.repeat(threshold, self.counts)

    def rank(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`."""
        keys, _ = self._keys(values)
        before, counts = (np.repeat(values, self.counts) for values in (self.ends - self.counts, self.counts))
        not_larger = np.searchsorted(np.sort(keys), keys, side="right") - before
        return (not_larger / counts).astype(np.float32)

    def _reduce(self, operation: np.ufunc, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        reduced = np.zeros(len(self.counts), dtype=dtype)
        held = self.counts > 0  # reduceat knows no empty segments
        if held.any():
            reduced[held] = operation.reduceat(values, (self.ends - self.counts)[held], dtype=dtype)
        return reduced

    def _keys(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integers (N,) that order values by segment first, and the least integer (S,) of each segment."""
        wide = np.uint32 if len(self.counts) < 1 << 16 else np.uint64
        first_keys = np.left_shift(np.arange(len(self.counts), dtype=wide), wide(16))
        keys = np.repeat(first_keys, self.counts)
        keys |= ORDER[half_bits(values)]
        return keys, first_keys


class TensorSegments:
    """Segments of tensors.

    Args:
        index: (N,) int64, the segment of each value, ascending from 0 without gaps.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.counts = index.bincount()

    def sums(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        return values.new_zeros(len(self.counts)).index_add_(0, self.index, values)

    def maxima(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        return values.new_full((len(self.counts),), -math.inf).scatter_reduce_(0, self.index, values, "amax")

    def spread(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        return values[self.index]

    def top(self, values: Tensor, fraction: float, of_magnitudes: float) -> Tensor:
        """See `Segments`."""
        if fraction == 1:
            return torch.ones_like(values, dtype=torch.bool)
        ranked = values[self._order(values)]
        kept = (self.counts.double() * fraction - 1e-9).ceil().long().clamp(min=1)
        ends = self.counts.cumsum(0)
        silent = self.maxima(values.abs()) == 0
        threshold = ranked[ends - kept].masked_fill(silent, math.inf)
        selected = values >= threshold[self.index]
        return selected & (values > 0) if of_magnitudes else selected

    def rank(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        order = self._order(values)
        ranked, segment = values[order], self.index[order]
        at = torch.arange(len(values), device=values.device)
        last = torch.ones_like(segment, dtype=torch.bool)  # of a run of equal values
        last[:-1] = (ranked[1:] != ranked[:-1]) | (segment[1:] != segment[:-1])
        ends = at.masked_fill(~last, len(values)).flip(0).cummin(0).values.flip(0)
        starts = (self.counts.cumsum(0) - self.counts)[segment]
        ranks = torch.empty_like(values)
        ranks[order] = ((ends + 1 - starts) / self.counts[segment]).to(values.dtype)
        return ranks

    def _order(self, values: Tensor) -> Tensor:
        """(N,) where the values lie, by segment and then ascending."""
        order = values.sort(stable=True).indices
        return order if len(self.counts) == 1 else order[self.index[order].sort(stable=True).indices]


def half_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values as float16 stores them, the largest in place of larger ones, (N,) uint16."""
    if values.dtype != np.float16:
        values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return values.view(np.uint16)


def _order_of_bits() -> np.ndarray:
    """For each bit pattern of float16 an integer; they are ordered as the values are, and -0 is 0. (65536,) uint16."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    order = np.where(bits & 0x8000, ~bits, bits | 0x8000)
    order[0x8000] = order[0]
    return order.astype(np.uint16)


ORDER = _order_of_bits()
ZERO_KEY = ORDER[0]
