import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weighted_mtp.schemas.shard_set.value_counts import QUANTILES, ValueCounts, from_table, to_table

float16s = hnp.arrays(np.float16, st.integers(1, 300), elements=st.floats(width=16, allow_infinity=True))


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


@given(float16s, float16s)
def test_counts_of_parts_add_up_and_survive_parquet_form(first: np.ndarray, second: np.ndarray) -> None:
    whole = counted(np.concatenate([first, second]))
    parts = counted(first)
    parts.merge(counted(second))
    again = from_table(to_table({"a": parts, "b": counted(first)}))
    np.testing.assert_array_equal(again["a"].counts, whole.counts)
    np.testing.assert_array_equal(again["b"].counts, counted(first).counts)
