import numpy as np

from weighted_mtp.schemas.shard_set.rounding import float16_bits, round_contrast


def test_contrasts_are_multiples_of_a_512th():
    contrast = np.array([np.nan, 0.001, -0.0005, 1 / 512 + 1e-5, 70000, -70000], np.float32)
    rounded = round_contrast(contrast)
    np.testing.assert_array_equal(rounded, np.array([np.nan, 1 / 512, 0, 1 / 512, 65504, -65504], np.float32))
    assert not np.signbit(rounded[2])


def test_float16_bits_of_values_beyond_the_range():
    values = np.array([0, -0.0, 1, 70000, -70000, np.nan], np.float32)
    expected = np.array([0x0000, 0x8000, 0x3C00, 0x7BFF, 0xFBFF, 0x7E00], np.uint16)  # IEEE 754 half precision
    np.testing.assert_array_equal(float16_bits(values), expected)
