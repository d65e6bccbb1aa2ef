"""Formulas evaluated by hand."""

import math

import numpy as np
import pytest
from weighted_sets import NAN, MakeSet, assert_weights, scored, weights_of

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting

RNG = np.random.default_rng(0)


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


@pytest.mark.parametrize("by", ["sequence", "batch"])
@pytest.mark.parametrize("scale", [1e5, 1e-9, 1e25, 1e-25])
def test_scale_changes_no_comparison_within_a_sequence_or_batch(make_shard_set: MakeSet, by: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    losses, others = ([[NAN, *(rng.integers(1, 2000, 40) / 512)] for _ in range(4)] for _ in range(2))
    shards = scored(make_shard_set, loss_a=losses, loss_b=others, size=[scale] * 4)
    x = np.subtract(losses, others)[:, 1:]  # (4, 40)
    values = x if by == "sequence" else x.reshape(1, -1)
    kept = math.ceil(0.3 * values.shape[1])
    expected = {
        "top({}, 0.3, by={by})": values >= np.sort(values, axis=1)[:, -kept, None],
        "rank({}, by={by})": (values[:, None, :] <= values[:, :, None]).mean(axis=2),
        "signed(standardise({}, by={by}))": (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True),
    }
    for formula, weights in expected.items():
        for scaled in (f"{scale} * (loss_a - loss_b)", "(loss_a - loss_b) * size"):
            found = weights_by(shards, formula.format(scaled, by=by))
            np.testing.assert_allclose(found, weights.reshape(x.shape), rtol=1e-5, atol=1e-6)


def weights_by(shards: ZippedSets, formula: str) -> np.ndarray:
    """Weights (4, 40) of the targets of four sequences, which are one batch."""
    config = WeightsConfig(formula=formula)
    weighting = make_weighting(config, shards)
    tables = [shards.read(*place) for place in ((0, weighting.columns, 0), (1, weighting.columns, 0))]
    weights = np.concatenate([weighting.weigh(table, RNG) for table in tables])
    if weighting.waits:
        positions = np.tile(np.arange(41), (4, 1))
        weights = BatchWeighting.make(config).weigh_tokens(weights.reshape(4, 41, -1), positions, RNG)
    return weights.reshape(4, 41)[:, 1:]


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_that_overflow_are_not_compared(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 100, 1]], loss_b=[[NAN, 1, 1]], size=[1e30])
    for x in ("1e38 * loss_a", "1e37 * loss_a * loss_b"):
        for by in ("sequence", "corpus"):
            with pytest.raises(UserError, match=r"overflows float32; scale it down|beyond float16"):
                weights_of(shards, formula=f"top({x}, 0.5, by={by})")
    with pytest.raises(UserError, match="overflows float32; scale it down"):
        weights_of(shards, formula="top(1e30 * size, 0.5)")
