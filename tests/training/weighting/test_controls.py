"""Shuffled and random controls."""

import numpy as np
import pytest
from weighted_sets import NAN, MakeSet, scored, weights_of

from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.weights.presets import PRESETS
from weighted_mtp.training.weighting.controls import lognormal_like, shuffle_within

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("control", ["shuffled", "random"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("uniform", "rho1", "reward", "advantage")])
def test_controls_go_around_any_preset(preset: str, control: str, make_shard_set: MakeSet) -> None:
    rng = np.random.default_rng(1)
    lengths = [40, 2, 1, 300]
    names = ("loss_reference", "entropy_reference", "excess_loss", "long_short")
    scores = {
        name: [[NAN, *(rng.normal(size=n - 1) + (4 if "_reference" in name else 0))] for n in lengths] for name in names
    }
    shards = scored(make_shard_set, **scores)
    plain, controlled = (weights_of(shards, preset=preset, control=c) for c in ("none", control))
    assert plain != controlled
    for own, other in zip(plain, controlled, strict=True):
        assert other[0] == 0
        if control == "shuffled":
            assert sorted(own) == pytest.approx(sorted(other))


def test_shuffled_control_keeps_each_sequences_weights() -> None:
    weights, lengths = RNG.random(1000).astype(np.float32), np.array([300, 0, 1, 699])
    shuffled = shuffle_within(weights, lengths, np.random.default_rng(1))
    assert (shuffled != weights).any()
    for own, other in zip(np.split(weights, [300, 301]), np.split(shuffled, [300, 301]), strict=True):
        np.testing.assert_array_equal(np.sort(own), np.sort(other))
    assert len(shuffle_within(weights[:0], lengths[:0], RNG)) == 0


def test_weights_of_documents_are_shuffled_between_them(make_shard_set: MakeSet) -> None:
    rewards = [float(number) for number in range(1, 30)]
    shards = ZippedSets((make_shard_set([[1, 1, 1]] * 29, {}, "set", 29, sequence_columns={"reward": rewards}),))
    found = weights_of(shards, preset="reward", control="shuffled")
    assert all(row[0] == 0 and row[1] == row[2] for row in found)
    assert [row[1] for row in found] != rewards
    assert sorted(row[1] for row in found) == rewards


def test_every_order_of_a_shuffle_is_as_likely() -> None:
    drawn = np.array([shuffle_within(np.arange(3), np.array([3]), RNG) for _ in range(6000)])
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert abs(counts - 1000).max() < 150  # five standard deviations


def test_random_control_has_equal_moments() -> None:
    weights = (RNG.random(400_000) < 0.6).astype(np.float32) / 0.6
    drawn = lognormal_like(weights, np.random.default_rng(1))
    assert drawn.min() > 0
    assert drawn.mean() == pytest.approx(weights.mean(), rel=0.01)
    assert drawn.std() == pytest.approx(weights.std(), rel=0.03)
    np.testing.assert_array_equal(lognormal_like(np.zeros(3, np.float32), RNG), 0)
