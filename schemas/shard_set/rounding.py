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
_BITS_OF_VALUES = np.zeros(1 << (32 - DROPPED_BITS), dtype=np.uint16)
"""Inverse of `FLOAT16_VALUES`, indexed by the high bits of a float32 value."""
_BITS_OF_VALUES[FLOAT16_VALUES.view(np.uint32) >> DROPPED_BITS] = np.arange(1 << 16, dtype=np.uint16)


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
    patterns = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if np.bitwise_or.reduce(patterns, initial=0) & ((1 << DROPPED_BITS) - 1):
        return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).view(np.uint16)
    return _BITS_OF_VALUES.take(patterns >> DROPPED_BITS)
