import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from schemas.value_counts import QUANTILES, ValueCounts, from_table, to_table

float16s = hnp.arrays(np.float16, st.integers(1, 300), elements=st.floats(width=16, allow_infinity=True))
finite = hnp.arrays(np.float16, st.integers(1, 300), elements=st.floats(-100, 100, width=16))


def counted(values: np.ndarray) -> ValueCounts:
    counts = ValueCounts()
    counts.add(values)
    return counts


@given(float16s)
def test_statistics_are_those_of_the_finite_values(values: np.ndarray) -> None:
    statistics = counted(values).statistics()
    kept = values[np.isfinite(values)].astype(np.float64)
    assert (statistics.count, statistics.missing) == (len(kept), len(values) - len(kept))
    if not len(kept):
        assert statistics.mean is None
        assert statistics.quantiles == {}
        return
    assert statistics.mean == pytest.approx(kept.mean(), rel=1e-9, abs=1e-9)
    assert statistics.std == pytest.approx(kept.std(), rel=1e-6, abs=1e-6)
    for q in QUANTILES:
        assert statistics.quantiles[str(q)] == np.quantile(kept, q, method="inverted_cdf")


@given(finite, st.floats(0.01, 1.0))
def test_top_threshold_keeps_the_fraction_and_no_smaller_set_of_values_does(values: np.ndarray, share: float) -> None:
    threshold = counted(values).top_threshold(share)
    assert threshold in values
    assert (values >= threshold).mean() >= share - 1e-9
    assert (values > threshold).mean() < share


def test_ties_at_the_threshold_are_kept() -> None:
    values = np.array([3, 2, 2, 2, 1], np.float16)
    assert counted(values).top_threshold(0.4) == 2
    assert counted(values).top_threshold(0.2) == 3
    assert counted(values).top_threshold(1.0) == 1


def test_nothing_passes_the_threshold_of_an_empty_column() -> None:
    assert counted(np.array([np.nan], np.float16)).top_threshold(0.5) == float("inf")


def test_mean_of_a_function_is_the_mean_over_tokens() -> None:
    values = np.array([-1, 0, 2, 2, np.nan], np.float16)
    assert counted(values).mean_of(lambda v: np.maximum(v, 0)) == pytest.approx(1.0)
    assert np.isnan(ValueCounts().mean_of(np.abs))


@given(float16s, float16s)
def test_counts_of_parts_add_up_and_survive_parquet_form(first: np.ndarray, second: np.ndarray) -> None:
    whole = counted(np.concatenate([first, second]))
    parts = counted(first)
    parts.merge(counted(second))
    again = from_table(to_table({"a": parts, "b": counted(first)}))
    np.testing.assert_array_equal(again["a"].counts, whole.counts)
    np.testing.assert_array_equal(again["b"].counts, counted(first).counts)
