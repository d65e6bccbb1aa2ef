"""Sums, thresholds and ranks over segments, in numpy and in torch, against a loop over the segments."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.weighting.segments import ArraySegments, TensorSegments

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def in_array(method: str, values: np.ndarray, lengths: list[int], *numbers: float) -> np.ndarray:
    return getattr(ArraySegments(np.array(lengths)), method)(values, *numbers)


def in_tensor(method: str, values: np.ndarray, lengths: list[int], *numbers: float) -> np.ndarray:
    segments = TensorSegments(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))
    return getattr(segments, method)(torch.from_numpy(values), *numbers).numpy()


def in_loop(function: Callable[[np.ndarray], object], values: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.array([function(part) for part in np.split(values, np.cumsum(lengths)[:-1])])


both = pytest.mark.parametrize("compute", [in_array, in_tensor])


def values_of(lengths: list[int], seed: int) -> np.ndarray:
    """Values with many ties, some segments all zero, and -0 among them."""
    values = np.random.default_rng(seed).integers(-2, 3, sum(lengths)).astype(np.float32) / 2
    return values * np.repeat(np.random.default_rng(seed).integers(0, 2, len(lengths)), lengths).astype(np.float32)


@both
@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.floats(0.05, 1), st.booleans(), st.integers(0, 99))
def test_top(
    compute: Callable[..., np.ndarray], lengths: list[int], fraction: float, magnitudes: bool, seed: int
) -> None:
    def plain(part: np.ndarray) -> np.ndarray:
        if fraction == 1:
            return np.ones(len(part), dtype=bool)
        kept = int(np.ceil(fraction * len(part) - 1e-9))
        top = part >= np.sort(part)[::-1][kept - 1]
        return top & (part > 0 if magnitudes else part.any())

    values = values_of(lengths, seed)
    values = abs(values) if magnitudes else values
    expected = np.concatenate([plain(part) for part in np.split(values, np.cumsum(lengths)[:-1])])
    np.testing.assert_array_equal(compute("top", values, lengths, fraction, float(magnitudes)), expected)


@both
@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_rank(compute: Callable[..., np.ndarray], lengths: list[int], seed: int) -> None:
    values = values_of(lengths, seed)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    expected = np.concatenate([[(part <= value).mean() for value in part] for part in parts])
    np.testing.assert_allclose(compute("rank", values, lengths), expected, rtol=1e-6)


@both
@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.integers(0, 99))
def test_sums_and_maxima(compute: Callable[..., np.ndarray], lengths: list[int], seed: int) -> None:
    values = values_of(lengths, seed)
    np.testing.assert_allclose(compute("sums", values, lengths), in_loop(np.sum, values, lengths))
    np.testing.assert_array_equal(compute("maxima", values, lengths), in_loop(np.max, values, lengths))
    spread = compute("broadcast", np.arange(len(lengths), dtype=np.float32), lengths)
    np.testing.assert_array_equal(spread, np.repeat(np.arange(len(lengths)), lengths))


@both
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.7, 1 / 3])
def test_how_many_are_kept_is_not_left_to_rounding(compute: Callable[..., np.ndarray], fraction: float) -> None:
    for count in (*range(1, 100), 2990, 3000):
        values = np.random.default_rng(count).permutation(count).astype(np.float32) - count // 2 + 1
        assert compute("top", values, [count], fraction, 0.0).sum() == math.ceil(round(fraction * count, 6)), count


def test_empty_segments() -> None:
    """A sequence without any score is an empty segment."""
    segments = ArraySegments(np.array([0, 2, 0, 1, 0]))
    values = np.array([1, 2, -3], np.float32)
    assert segments.sums(values).tolist() == [0, 3, 0, -3, 0]
    assert segments.maxima(values).tolist() == [0, 2, 0, -3, 0]
    assert segments.top(values, 0.5, 0.0).tolist() == [False, True, True]
    assert segments.rank(values).tolist() == [0.5, 1, 1]
    nothing = ArraySegments(np.array([0, 0]))
    assert nothing.sums(values[:0]).tolist() == [0, 0]
    assert nothing.top(values[:0], 0.5, 0.0).tolist() == []


@both
@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.sampled_from([1e5, 1e-9, -3e37, 1 / 3]), st.integers(0, 99))
def test_the_scale_of_values_does_not_matter(
    compute: Callable[..., np.ndarray], lengths: list[int], scale: float, seed: int
) -> None:
    values = values_of(lengths, seed)
    scaled = values * np.float32(scale)
    values *= np.sign(scale).astype(np.float32)
    for method, *numbers in (("top", 0.3, 0.0), ("top", 0.7, 0.0), ("rank",)):
        expected = compute(method, values, lengths, *numbers)
        np.testing.assert_array_equal(compute(method, scaled, lengths, *numbers), expected)


@both
def test_values_are_ranked_in_float32(compute: Callable[..., np.ndarray]) -> None:
    values = np.array([1, 1 + 2**-13, 70_000, 80_000, 0, -0.0, -1 - 2**-20, -1], np.float32)
    assert compute("rank", values, [4, 4]).tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 0.25, 0.5]
    assert compute("top", values, [4, 4], 0.25, 0.0).tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_values_that_are_not_finite_have_no_rank() -> None:
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(UserError, match="a value to compare overflows float32; scale it down, or limit it"):
            in_array("top", np.array([1, value], np.float32), [2], 0.5, 0.0)


def test_many_sequences_need_wider_keys() -> None:
    lengths = [2] * (1 << 16) + [1]
    for larger in (2, 1.0001):
        values = np.tile(np.array([1, larger], np.float32), 1 << 16)
        kept = in_array("top", np.append(values, np.float32(5)), lengths, 0.5, 1.0)
        assert kept.tolist() == [False, True] * (1 << 16) + [True]
