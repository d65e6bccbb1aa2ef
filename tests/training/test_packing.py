"""Packing keeps every token exactly once and documents whole."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.packing import best_fit, pack, split_long


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 25))
def test_every_token_once_in_order_and_documents_apart(lengths: list[int], row_length: int) -> None:
    total = sum(lengths)
    ids, positions, weights, row_tokens = pack(
        np.arange(1, total + 1, dtype=np.int32),
        np.arange(1, total + 1, dtype=np.float32),
        np.array(lengths),
        row_length,
    )
    real = ids > 0
    np.testing.assert_array_equal(row_tokens, real.sum(1))
    assert sorted(ids[real].tolist()) == list(range(1, total + 1))
    np.testing.assert_array_equal(ids, weights)
    assert not positions[~real].any()
    # Position p > 0 continues the token before it; pieces begin where a sequence starts or was cut.
    continues = positions[:, 1:] > 0
    np.testing.assert_array_equal(ids[:, 1:][continues], ids[:, :-1][continues] + 1)
    first = set(ids[real & (positions == 0)].tolist())
    starts = np.cumsum([0, *lengths[:-1]])
    cuts = {int(start) + i + 1 for start, n in zip(starts, lengths, strict=True) for i in range(0, n, row_length)}
    assert first == cuts


def test_split_long_by_hand() -> None:
    starts, lengths = split_long(np.array([3, 10, 4]), 4)
    assert starts.tolist() == [0, 3, 7, 11, 13]
    assert lengths.tolist() == [3, 4, 4, 2, 4]


def test_best_fit_by_hand() -> None:
    """Rows of 10: 7, 6, 4, 3, 2 go to (7, 3), (6, 4) and (2)."""
    rows = best_fit(np.array([2, 7, 3, 6, 4]), 10)
    assert rows == [[1, 2], [3, 4], [0]]
