"""Formulas evaluated by hand."""

import math

import numpy as np
from weighted_sets import NAN, MakeSet, assert_weights, scored, weights_of


def test_composed_formulas_by_hand(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 1, 2, 4]], loss_b=[[NAN, 2, 0, 1]], s=[[NAN, -1, 0, 1]])
    cases = {
        "loss_a / loss_b": [0, 0.5, 0, 4],  # division by 0 gives 0
        "loss_a * loss_b": [0, 2, 0, 4],
        "0.25 * loss_a + 0.75 * loss_b": [0, 1.75, 0.5, 1.75],
        "s > 0": [0, 0, 0, 1],
        "s <= 0": [0, 1, 1, 0],
        "loss_a >= loss_b": [0, 0, 1, 1],
        "sigmoid(s) * 2": [0, 2 / (1 + math.e), 1, 2 / (1 + 1 / math.e)],
        "exp(s + 1)": [0, 1, math.e, math.e**2],
        "clip(3 * s, 0, 2)": [0, 0, 0, 2],
        "relu(-s)": [0, 1, 0, 0],
        "abs(s)": [0, 1, 0, 1],
        "rank(s, by=sequence)": [0, 1 / 3, 2 / 3, 1],
        "signed(standardise(loss_b, by=sequence))": [0, math.sqrt(1.5), -math.sqrt(1.5), 0],
        "softmax(s, by=sequence)": [0, *(3 * np.exp([-1, 0, 1]) / np.exp([-1, 0, 1]).sum())],
        "interpolate(normalise(loss_a, by=sequence), 0.5)": [0, 5 / 7, 13 / 14, 19 / 14],
        "top(loss_a + loss_b, 0.3, by=sequence) * abs(s)": [0, 0, 0, 1],
        "loss_a * (exp(2) > 1)": [0, 1, 2, 4],  # comparisons of constants
        "loss_a + (clip(3, 0, 1) < 1)": [0, 1, 2, 4],
        "exp(100 * loss_a)": [0, *[math.exp(11)] * 3],
    }
    for formula, expected in cases.items():
        assert_weights(weights_of(shards, formula=formula), [expected])


def test_zeros_are_never_among_the_top_of_magnitudes(make_shard_set: MakeSet) -> None:
    """long_short is 0 where the short context is the whole context: ties at threshold 0 would keep every token."""
    scores = [[NAN, 0, 0, 0, 0, 0, 1, 2, -3, 4, 5], [NAN, 0, 0, 0, 1]]
    shards = scored(make_shard_set, long_short=scores)
    expected = [[0] * 6 + [2] * 5, [0, 0, 0, 0, 4]]
    assert_weights(weights_of(shards, preset="sparse"), expected)
    positive = [[0] * 6 + [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert_weights(weights_of(shards, formula="top(relu(long_short), 0.6)"), positive)
    signed = [[float(s >= 0) if s == s else 0 for s in row] for row in scores]
    assert_weights(weights_of(shards, formula="top(long_short, 0.6)"), signed)  # here 0 is a score like any other
