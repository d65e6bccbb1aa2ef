"""Sums, ranks and thresholds over segments of consecutive tokens: documents, or a whole batch.

The numpy version serves weights from stored columns, the torch version weights from current losses. The methods are
documented in `schemas.weights.function_record.Segments`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_VALUES, float16_bits

OVERFLOW = "a value to compare overflows float32; scale it down, or limit it with clip()"


class ArraySegments:
    """Segments of numpy arrays. One sort of integer keys ranks the values of all segments.

    Args:
        counts: (S,) number of values in each segment.
    """

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; (S,) float64."""
        return self._reduce(np.add, values, np.dtype(np.float64))

    def maxima(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; (S,), 0 for an empty segment."""
        return self._reduce(np.maximum, values, values.dtype)

    def broadcast(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`; (N,) float32."""
        return np.repeat(values.astype(np.float32), self.counts)

    def top(self, values: np.ndarray, fraction: float, of_magnitudes: float) -> np.ndarray:
        """See `Segments`."""
        if fraction == 1:
            return np.ones(len(values), dtype=bool)
        keys, zeros = self._keys(values)  # (N,), (S,)
        ranked = np.sort(keys)  # (N,), by segment and then by value
        kept = np.maximum(np.ceil(fraction * self.counts - 1e-9), 1).astype(np.int64)  # (S,)
        threshold = np.full(len(self.counts), np.iinfo(keys.dtype).max, dtype=keys.dtype)  # (S,), keeps nothing
        selects = self.counts > 0  # (S,), segments that are neither empty nor all 0
        least, largest = ranked[(self.ends - self.counts)[selects]], ranked[self.ends[selects] - 1]
        selects[selects] = (least != zeros[selects]) | (least != largest)
        threshold[selects] = ranked[(self.ends - kept)[selects]]
        if of_magnitudes:
            threshold = np.maximum(threshold, zeros + keys.dtype.type(1))
        return keys >= np.repeat(threshold, self.counts)

    def rank(self, values: np.ndarray) -> np.ndarray:
        """See `Segments`."""
        keys, _ = self._keys(values)
        starts, counts = (np.repeat(each, self.counts) for each in (self.ends - self.counts, self.counts))  # (N,)
        not_larger = np.searchsorted(np.sort(keys), keys, side="right") - starts
        return (not_larger / counts).astype(np.float32)

    def _reduce(self, operation: np.ufunc, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        reduced = np.zeros(len(self.counts), dtype=dtype)
        nonempty = self.counts > 0  # reduceat does not support empty segments
        if nonempty.any():
            reduced[nonempty] = operation.reduceat(values, (self.ends - self.counts)[nonempty], dtype=dtype)
        return reduced

    def _keys(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sort keys (N,), ordered by segment and then value, and the key of 0 in each segment (S,).

        Keys of values that are float16, such as stored scores, have half the size, so they are sorted faster.

        Raises:
            UserError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise UserError(f"--weights.formula: {OVERFLOW}")
        bits = float16_bits(values)
        if np.array_equal(FLOAT16_VALUES.take(bits), values):
            width, value_keys, zero = 16, SORT_KEYS.take(bits), SORT_KEYS[0]
        else:
            width, value_keys, zero = 32, _sort_keys((values + np.float32(0)).view(np.uint32)), np.uint32(1 << 31)
        dtype = np.uint32 if (len(self.counts) - 1).bit_length() + width <= 32 else np.uint64
        first_keys = np.left_shift(np.arange(len(self.counts), dtype=dtype), dtype(width))
        keys = np.repeat(first_keys, self.counts)  # high bits: segment; low bits: value
        keys |= value_keys
        return keys, first_keys + zero


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

    def broadcast(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        return values[self.index]

    def top(self, values: Tensor, fraction: float, of_magnitudes: float) -> Tensor:
        """See `Segments`."""
        if fraction == 1:
            return torch.ones_like(values, dtype=torch.bool)
        ranked = values[self._order(values)]  # (N,), by segment and then by value
        kept = (self.counts.double() * fraction - 1e-9).ceil().long().clamp(min=1)  # (S,)
        ends = self.counts.cumsum(0)
        silent = self.maxima(values.abs()) == 0
        threshold = ranked[ends - kept].masked_fill(silent, math.inf)  # (S,)
        selected = values >= threshold[self.index]
        return selected & (values > 0) if of_magnitudes else selected

    def rank(self, values: Tensor) -> Tensor:
        """See `Segments`."""
        order = self._order(values)
        ranked, segment = values[order], self.index[order]  # (N,), by segment and then by value
        position = torch.arange(len(values), device=values.device)
        is_last = torch.ones_like(segment, dtype=torch.bool)  # of a run of equal values
        is_last[:-1] = (ranked[1:] != ranked[:-1]) | (segment[1:] != segment[:-1])
        last = position.masked_fill(~is_last, len(values)).flip(0).cummin(0).values.flip(0)  # (N,), of each value's run
        starts = (self.counts.cumsum(0) - self.counts)[segment]
        ranks = torch.empty_like(values)
        ranks[order] = ((last + 1 - starts) / self.counts[segment]).to(values.dtype)
        return ranks

    def _order(self, values: Tensor) -> Tensor:
        """Indices (N,) that sort the values by segment and then ascending."""
        order = values.sort(stable=True).indices
        return order if len(self.counts) == 1 else order[self.index[order].sort(stable=True).indices]


def _sort_keys(bits: np.ndarray) -> np.ndarray:
    """Integers in the order of the floating-point values with these bit patterns (...), unsigned integers."""
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


SORT_KEYS = _sort_keys(np.arange(1 << 16, dtype=np.uint16))
"""The sort key of each float16 bit pattern, (65536,) uint16; -0 and 0 are equal."""
SORT_KEYS[1 << 15] = SORT_KEYS[0]
