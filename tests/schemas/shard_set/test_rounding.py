import numpy as np

from weighted_mtp.schemas.shard_set.rounding import (
    FLOAT16_VALUES,
    Float16Table,
    float16_bits,
    round_float16,
    round_nats,
)


def test_nats_are_multiples_of_a_512th():
    values = np.array([np.nan, 0.001, -0.0005, 1 / 512 + 1e-5, 70000, -70000], np.float32)
    rounded = round_nats(values)
    np.testing.assert_array_equal(rounded, np.array([np.nan, 1 / 512, 0, 1 / 512, 65504, -65504], np.float32))
    assert not np.signbit(rounded[2])


def test_the_nearest_value_is_chosen_at_every_magnitude():
    """Against the nearest of all float16 values that are multiples of 1/512."""
    allowed = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    allowed = np.unique(allowed[np.isfinite(allowed)].astype(np.float64))
    allowed = allowed[allowed * 512 == np.round(allowed * 512)]
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 2000) * 10 ** rng.uniform(-5, 4.8, 2000)).astype(np.float32)
    above = np.searchsorted(allowed, values)
    nearest = np.minimum(
        np.abs(values - allowed[above - 1]), np.abs(allowed[above.clip(max=len(allowed) - 1)] - values)
    )
    np.testing.assert_array_equal(np.abs(round_nats(values).astype(np.float64) - values), nearest)


def test_float16_bits_of_all_float16_values():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    number = np.isfinite(values)
    for found in (float16_bits(FLOAT16_VALUES), float16_bits(np.append(FLOAT16_VALUES, np.float32(0.1)))[:-1]):
        np.testing.assert_array_equal(found[number], values.view(np.uint16)[number])
        assert np.isnan(found.view(np.float16)[np.isnan(values)]).all()
    assert float16_bits(np.zeros(0, np.float32)).shape == (0,)


def test_float16_bits_round():
    values = np.concatenate([np.linspace(-70000, 70000, 1001), 2.0 ** -np.arange(30), [np.nan]]).astype(np.float32)
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(float16_bits(values), expected.view(np.uint16))
    np.testing.assert_array_equal(round_float16(values), expected.astype(np.float32))


def test_float16_bits_of_values_beyond_the_range():
    values = np.array([0, -0.0, 1, 70000, -70000, np.nan], np.float32)
    expected = np.array([0x0000, 0x8000, 0x3C00, 0x7BFF, 0xFBFF, 0x7E00], np.uint16)  # IEEE 754 half precision
    np.testing.assert_array_equal(float16_bits(values), expected)
    powers = np.array([2.0**17, -(2.0**40), 2.0**-30, -(2.0**-25)], np.float32)  # short mantissas, like float16
    np.testing.assert_array_equal(float16_bits(powers), np.array([0x7BFF, 0xFBFF, 0x0000, 0x8000], np.uint16))


def test_a_table_gives_the_entry_of_the_rounded_value():
    table = Float16Table(3 * np.arange(1 << 16))
    for values in ([0.5, -2, 65504, 2.0**-24], [0.1, -7.3, 1e-9, 3.14159]):
        bits = np.array(values, np.float16).view(np.uint16).astype(np.int64)
        np.testing.assert_array_equal(table.look_up(np.array(values, np.float32)), 3 * bits)
