"""Rounding of scores. Every score is a float16 value; losses, entropies and contrasts are multiples of 1/512 nat."""

import numpy as np

FLOAT16_MAX = float(np.finfo(np.float16).max)
NAT_STEP = np.float32(2.0**-9)
"""Quantities in nats are stored as multiples of this."""
COARSE = 4.0
"""From here on, all float16 values are multiples of `NAT_STEP`."""

EXPONENT_SHIFT = np.float32(2.0**-112)
"""The ratio of numbers whose exponent has the same bits in float32 and in float16."""
BLOCK = 1 << 14


def round_nats(values: np.ndarray) -> np.ndarray:
    """Round to the nearest float16 value that is a multiple of 1/512 nat; float32 in, float16 out. NaN stays NaN.

    Values beyond the range of float16 are clipped. float16 resolves values near 0 far more finely than engines compute
    them: two engines differ by about 0.03 nats. These digits would only cost storage.
    """
    values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
    steps = np.round(values / NAT_STEP) * NAT_STEP + np.float32(0)  # adding 0 turns -0 into 0
    return np.where(np.abs(values) < COARSE, steps, values).astype(np.float16)


def exact_float16(values: np.ndarray) -> np.ndarray:
    """Convert float32 values (N,) that are float16 values to float16, faster than `astype`.

    The product has the exponent of the float16 in the low bits of its own, so only the order of the bits is left.
    Blocks fit into the cache of a core.
    """
    result = np.empty(len(values), np.uint16)
    product, magnitude, sign = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    with np.errstate(invalid="ignore"):  # NaN
        for first in range(0, len(values), BLOCK):
            end = min(first + BLOCK, len(values))
            some = slice(0, end - first)
            bits = np.multiply(values[first:end], EXPONENT_SHIFT, out=product[some]).view(np.uint32)
            np.bitwise_and(np.right_shift(bits, 13, out=magnitude[some]), 0x7FFF, out=magnitude[some])
            np.bitwise_and(np.right_shift(bits, 16, out=sign[some]), 0x8000, out=sign[some])
            result[first:end] = np.bitwise_or(magnitude[some], sign[some], out=sign[some])
    return result.view(np.float16)


def float16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values (N,) rounded to float16 and clipped to its range, (N,) uint16."""
    if values.dtype != np.float16:
        values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return values.view(np.uint16)
