"""Thresholds, ranks and moments from counted values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weighted_mtp.schemas.weights.distribution import Distribution

finite = hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=16))


def distribution(values: np.ndarray) -> Distribution:
    return Distribution.from_values(values, np.ones(len(values), dtype=np.int64))


@given(finite, st.floats(0.01, 1.0))
def test_the_threshold_keeps_the_fraction_and_no_smaller_set_of_values_does(values: np.ndarray, share: float) -> None:
    threshold = distribution(values).threshold(share)
    assert threshold in values
    assert (values >= threshold).mean() >= share - 1e-9
    assert (values > threshold).mean() < share


def test_ties_at_the_threshold_are_kept() -> None:
    seen = Distribution.from_values(np.array([3, 2, 1, 2], np.float32), np.array([1, 2, 1, 1]))
    assert (seen.threshold(0.4), seen.threshold(0.2), seen.threshold(1.0)) == (2, 3, 1)
    assert seen.ranks.tolist() == [0.2, 0.8, 1.0]


@given(finite)
def test_mean_and_deviation_are_those_of_all_values(values: np.ndarray) -> None:
    seen = distribution(values)
    assert seen.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-9, abs=1e-9)
    assert seen.deviation == pytest.approx(values.std(dtype=np.float64), rel=1e-6, abs=1e-6)
