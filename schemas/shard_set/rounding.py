"""Rounding of scores. Every score is a float16 value; losses, entropies and contrasts are multiples of 1/512 nat.

Arrays and files hold scores as float32: other tools know that type, and NumPy computes faster with it.
"""

import numpy as np

FLOAT16_MAX = float(np.finfo(np.float16).max)
NAT_STEP = np.float32(2.0**-9)
"""Quantities in nats are stored as multiples of this."""
COARSE = 4.0
"""From here on, all float16 values are multiples of `NAT_STEP`."""
DROPPED_BITS = 13
"""Low bits of a float32 that are 0 in every float16 value."""
FLOAT16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The value of each float16 bit pattern, (65536,) float32."""
_HIGH_BITS = np.arange(1 << (32 - DROPPED_BITS), dtype=np.uint32) << DROPPED_BITS
"""The float32 bit patterns without dropped bits. Not all of them are float16 values: these have a smaller range."""


def round_nats(values: np.ndarray) -> np.ndarray:
    """Round to the nearest float16 value that is a multiple of 1/512 nat; float32 in and out. NaN stays NaN.

    Values beyond the range of float16 are clipped. float16 resolves values near 0 far more finely than engines compute
    them: two engines differ by about 0.03 nats. These digits would only cost storage.
    """
    steps = np.round(values / NAT_STEP) * NAT_STEP + np.float32(0)  # adding 0 turns -0 into 0
    return np.where(np.abs(values) < COARSE, steps, round_float16(values))


def round_float16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest float16 value, clipped to its range; float32 in and out. NaN stays NaN."""
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)


def float16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 values (N,) rounded to float16 and clipped to its range, (N,) uint16."""
    return _BITS.look_up(values)


class Float16Table:
    """A function of a float16 value, tabulated for values that are float32: faster than converting them to float16.

    Args:
        entries: (65536,), the results by bit pattern of the float16 value.
    """

    def __init__(self, entries: np.ndarray) -> None:
        self.entries = entries
        self._by_high_bits = entries[_BITS_OF_HIGH_BITS]

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """The results (N,) for float32 values (N,), which are rounded to float16 and clipped to its range."""
        patterns = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        if np.bitwise_or.reduce(patterns, initial=0) & ((1 << DROPPED_BITS) - 1):
            return self.entries[_to_float16_bits(values)]
        return self._by_high_bits.take(patterns >> DROPPED_BITS)


def _to_float16_bits(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).view(np.uint16)


_BITS_OF_HIGH_BITS = _to_float16_bits(_HIGH_BITS.view(np.float32))
_BITS_OF_HIGH_BITS[FLOAT16_VALUES.view(np.uint32) >> DROPPED_BITS] = np.arange(1 << 16, dtype=np.uint16)
_BITS = Float16Table(np.arange(1 << 16, dtype=np.uint16))
