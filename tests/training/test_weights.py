"""Every scheme on numbers worked out by hand, and the limits that must be plain cross-entropy."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.configs import WeightsConfig
from schemas.errors import UserError
from schemas.shard_set import ShardSet
from schemas.zipped import ZippedSets
from training.weights import (
    Weighting,
    dense,
    lognormal_like,
    make_weighting,
    shuffle_within,
    soft_threshold,
    sparse,
)

RNG = np.random.default_rng(0)


def test_a_column_without_any_score_is_refused(make_shard_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((make_shard_set([[1, 2, 3]], {"loss_reference": [[np.nan] * 3]}),))
    for config in (WeightsConfig(preset="rho1"), WeightsConfig(preset="dense", column="loss_reference")):
        with pytest.raises(UserError, match="column 'loss_reference' has no score at all; choose another"):
            make_weighting(config, shards)


def test_dense_by_hand() -> None:
    """|s| = 1, 3 | 0, 0 | 2 has means 2, 0, 2; the middle sequence carries no signal and keeps only lambda."""
    weights = dense(np.array([-1, 3, 0, 0, 2], np.float32), np.array([2, 2, 1]), 0.5)
    np.testing.assert_allclose(weights, [0.75, 1.25, 0.5, 0.5, 1.0])


def test_sparse_by_hand() -> None:
    """Top half of 4 by |s|: 3 and the two tied 2s, so 3 tokens of weight 4/3; no signal: 0; a single token: 1."""
    scores = np.array([-2, 3, 0.5, 2, 0, 0, 0.1], np.float32)
    weights = sparse(scores, np.array([4, 2, 1]), 0.5)
    np.testing.assert_allclose(weights, [4 / 3, 4 / 3, 0, 4 / 3, 0, 0, 1], rtol=1e-6)


def test_soft_threshold_by_hand() -> None:
    np.testing.assert_allclose(soft_threshold(np.array([-1, 0, 0.5, 2, 5], np.float32), 2.0), [0, 0, 0.25, 1, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.floats(0.05, 1), st.integers(0, 99))
def test_sparse_against_sorting_each_sequence(lengths: list[int], fraction: float, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(-3, 4, sum(lengths)).astype(np.float32) / 2
    own = sparse(scores, np.array(lengths), fraction)
    expected = []
    for part in np.split(scores, np.cumsum(lengths)[:-1]):
        magnitude = np.abs(part)
        kept = int(np.ceil(fraction * len(part) - 1e-9))
        selected = magnitude >= np.sort(magnitude)[::-1][kept - 1] if len(part) else magnitude > 0
        if fraction < 1:
            selected = selected & bool(magnitude.any())
        expected.extend(selected * (len(part) / max(selected.sum(), 1)))
    np.testing.assert_allclose(own, expected, rtol=1e-6)


def test_limits_are_plain_cross_entropy() -> None:
    scores, lengths = RNG.normal(size=20).astype(np.float32), np.array([7, 13])
    np.testing.assert_array_equal(dense(scores, lengths, 1.0), np.ones(20))
    np.testing.assert_array_equal(sparse(scores, lengths, 1.0), np.ones(20))
    np.testing.assert_array_equal(sparse(np.zeros(20, np.float32), lengths, 1.0), np.ones(20))


@pytest.mark.parametrize("preset", ["rho1-static", "soft-threshold"])
def test_corpus_wide_schemes_have_corpus_mean_one(preset: str, scored_set: Callable[..., ShardSet]) -> None:
    shards = scored_set([50, 1, 200, 30, 7, 400])
    weighting = make_weighting(WeightsConfig(preset=preset, fraction=0.3), ZippedSets((shards,)))
    scores, weights = [], []
    for shard in range(2):
        table = shards.read(shard)
        flat = table["excess_loss"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        scores.append(flat)
        weights.append(weighting(flat, np.diff(table["excess_loss"].combine_chunks().offsets.to_numpy()), RNG))
    flat, weight = np.concatenate(scores), np.concatenate(weights)
    scored = ~np.isnan(flat)
    assert weight[scored].mean() == pytest.approx(1, rel=1e-5)
    assert not weight[~scored].any()
    if preset == "rho1-static":
        kept = np.sort(flat[scored].astype(float))[::-1][: int(np.ceil(0.3 * scored.sum()))]
        np.testing.assert_array_equal(weight[scored] > 0, flat[scored] >= kept[-1])


def test_fraction_one_of_rho1_is_uniform(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([50, 60]),))
    weighting = make_weighting(WeightsConfig(preset="rho1-static", fraction=1.0), shards)
    np.testing.assert_array_equal(
        weighting(np.array([np.nan, -1.5, 0, 1], np.float16), np.array([4]), RNG), [0, 1, 1, 1]
    )


def test_unscored_tokens_do_not_count() -> None:
    """NaN at position 0 gets weight 0 and stays out of the sequence's mean."""
    weighting = Weighting("long_short", lambda scores, lengths: dense(scores, lengths, 0.0))
    weights = weighting(np.array([np.nan, 1, 3, np.nan], np.float16), np.array([3, 1]), RNG)
    np.testing.assert_allclose(weights, [0, 0.5, 1.5, 0])


def test_shuffled_control_keeps_each_sequences_weights() -> None:
    weights, lengths = RNG.random(1000).astype(np.float32), np.array([300, 1, 699])
    shuffled = shuffle_within(weights, lengths, np.random.default_rng(1))
    assert (shuffled != weights).any()
    for own, other in zip(np.split(weights, [300, 301]), np.split(shuffled, [300, 301]), strict=True):
        np.testing.assert_array_equal(np.sort(own), np.sort(other))


def test_random_control_has_equal_moments() -> None:
    weights = (RNG.random(400_000) < 0.6).astype(np.float32) / 0.6
    drawn = lognormal_like(weights, np.random.default_rng(1))
    assert drawn.min() > 0
    assert drawn.mean() == pytest.approx(weights.mean(), rel=0.01)
    assert drawn.std() == pytest.approx(weights.std(), rel=0.03)
    np.testing.assert_array_equal(lognormal_like(np.zeros(3, np.float32), RNG), 0)


def test_missing_column_names_the_ones_there_are(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([20, 20]),))
    with pytest.raises(UserError, match=r"no column 'loss_x' in .*/set \(score columns: excess_loss, long_short\)"):
        make_weighting(WeightsConfig(preset="dense", column="loss_x"), shards)


@pytest.mark.parametrize(
    ("preset", "message"), [("soft-threshold", "is positive nowhere"), ("sparse", "no value but 0")]
)
def test_scores_without_signal_are_refused(preset: str, message: str, make_shard_set: Callable[..., ShardSet]) -> None:
    value = 0.0 if preset == "sparse" else -1.0
    corpus = make_shard_set([[1, 2, 3]], name="corpus")
    scored = make_shard_set([[1, 2, 3]], {"excess_loss": [[np.nan, value, value]]}, name="scored")
    with pytest.raises(UserError, match=f"/scored: column 'excess_loss' .*{message}"):
        make_weighting(WeightsConfig(preset=preset, column="excess_loss"), ZippedSets((corpus, scored)))


def test_control_of_uniform_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need another --weights.preset than uniform"):
        WeightsConfig(control="shuffled")
