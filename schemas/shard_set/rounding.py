"""Rounding of scores. Every score is a float16 value; losses, entropies and contrasts are multiples of 1/512 nat."""

import numpy as np

FLOAT16_MAX = float(np.finfo(np.float16).max)
NAT_STEP = np.float32(2.0**-9)
"""Quantities in nats are stored as multiples of this."""
COARSE = 4.0
"""From here on, all float16 values are multiples of `NAT_STEP`."""


def round_nats(values: np.ndarray) -> np.ndarray:
    """Round to the nearest float16 value that is a multiple of 1/512 nat; float32 in, float16 out. NaN stays NaN.

    Values beyond the range of float16 are clipped. float16 resolves values near 0 far more finely than engines compute
    them: two engines differ by about 0.03 nats. These digits would only cost storage.
    """
    values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
    steps = np.round(values / NAT_STEP) * NAT_STEP + np.float32(0)  # adding 0 turns -0 into 0
    return np.where(np.abs(values) < COARSE, steps, values).astype(np.float16)


def float16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values (N,) rounded to float16 and clipped to its range, (N,) uint16."""
    if values.dtype != np.float16:
        values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return values.view(np.uint16)
