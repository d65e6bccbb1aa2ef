import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weighted_mtp.scoring.conditions.short_context import ContextWindow, make_short_context, plan_windows, window_ids

sizes_and_strides = st.integers(2, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size - 1)))


def slow_plan(length: int, size: int, stride: int) -> dict[int, int]:
    """Start of the window that scores each token from `size` on: the first one that gives it enough context."""
    starts = {}
    for token in range(size, length):
        window = 0
        while not window * stride + size - stride <= token < window * stride + size:
            window += 1
        starts[token] = window * stride
    return starts


@given(st.integers(1, 300), sizes_and_strides)
def test_every_token_is_scored_once_by_the_defined_window(length, size_and_stride):
    size, stride = size_and_stride
    scored = {}
    for span in plan_windows(length, size, stride):
        assert span.end <= length
        assert span.end - span.start <= size
        for token in range(span.first_scored, span.end):
            assert token not in scored
            assert token - span.start >= size - stride
            scored[token] = span.start
    assert scored == slow_plan(length, size, stride)


def test_plan_by_hand():
    # Window 1 covers 6..13 and scores 8..13; window 2 covers 12..16 and scores what is left of 14..19.
    assert list(plan_windows(17, 8, 6)) == [ContextWindow(6, 14, 8), ContextWindow(12, 17, 14)]
    assert list(plan_windows(8, 8, 6)) == []
    assert list(plan_windows(9, 8, 6)) == [ContextWindow(6, 9, 8)]


def test_bos_replaces_the_first_token_only_if_the_sequence_has_it():
    span = ContextWindow(4, 8, 6)
    ids = np.arange(10, dtype=np.int32)
    assert window_ids(ids, span, None).tolist() == [4, 5, 6, 7]
    assert window_ids(ids, span, 99).tolist() == [4, 5, 6, 7]
    assert window_ids(ids, span, 0).tolist() == [0, 5, 6, 7]
    assert ids.tolist() == list(range(10)), "the sequence itself stays as it is"


def test_default_stride_is_three_quarters():
    assert make_short_context(512, None).stride == 384
    assert make_short_context(2, None).stride == 1
    assert make_short_context(512, 100).stride == 100


@given(st.integers(1, 3000), sizes_and_strides)
def test_short_contexts_cost_at_most_size_over_stride_passes(length, size_and_stride):
    size, stride = size_and_stride
    tokens = sum(span.end - span.start for span in plan_windows(length, size, stride))
    assert tokens <= length * size / stride
