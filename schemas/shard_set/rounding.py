"""Scores as float16: the range, and the rounding of contrasts. Losses are stored as the nearest float16."""

import numpy as np

FLOAT16_MAX = float(np.finfo(np.float16).max)
CONTRAST_STEP = np.float32(2.0**-9)
"""Contrasts are stored as multiples of this, in nats."""


def round_contrast(contrast: np.ndarray) -> np.ndarray:
    """Round to multiples of 1/512 nat and clip to the range of float16; float32 in and out.

    Differences near 0 would have float16 digits far below the precision of their two losses (stored with a spacing of
    1/512 from 2 nats up; engines differ by about 0.03). These digits would cost storage.
    """
    rounded = np.round(contrast / CONTRAST_STEP) * CONTRAST_STEP + np.float32(0)  # adding 0 turns -0 into 0
    return np.clip(rounded, -FLOAT16_MAX, FLOAT16_MAX)


def float16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values (N,) rounded to float16 and clipped to its range, (N,) uint16."""
    if values.dtype != np.float16:
        values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)
    return values.view(np.uint16)
