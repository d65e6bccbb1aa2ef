"""Every scheme on numbers worked out by hand from its paper, the limits that equal plain cross-entropy, and errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from weighted_sets import NAN, MakeSet, assert_weights, scored, weights_of

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Imported, ImportedFile
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.weighting import make_weighting


def test_self_reference_keeps_low_loss_and_low_entropy(make_shard_set: MakeSet) -> None:
    """Lowest half of 4 losses 1, 2, 3, 4 and of entropies 4, 1, 2, 3; only the second token is in both."""
    columns = {"loss_reference": [[NAN, 1, 2, 3, 4]], "entropy_reference": [[NAN, 4, 1, 2, 3]]}
    shards = scored(make_shard_set, **columns)
    assert_weights(weights_of(shards, preset="self-reference-loss", fraction=0.5), [[0, 2, 2, 0, 0]])
    assert_weights(weights_of(shards, preset="self-reference-entropy", fraction=0.5), [[0, 0, 2, 2, 0]])
    assert_weights(weights_of(shards, preset="self-reference", fraction=0.5), [[0, 0, 4, 0, 0]])
    either = "normalise(clip(top(-loss_reference, 0.5) + top(-entropy_reference, 0.5), high=1))"
    assert_weights(weights_of(shards, formula=either), [[0, 4 / 3, 4 / 3, 4 / 3, 0]])


def test_dense_by_hand(make_shard_set: MakeSet) -> None:
    """|s| = 1, 3 | 0, 0 | 2 has means 2, 0, 2; the middle sequence carries no signal and keeps only lambda."""
    shards = scored(make_shard_set, long_short=[[NAN, -1, 3], [NAN, 0, 0], [NAN, 2]])
    expected = [[0, 0.75, 1.25], [0, 0.5, 0.5], [0, 1]]
    assert_weights(weights_of(shards, preset="dense", lam=0.5), expected)
    expected[1] = [0, 1, 1]
    assert_weights(weights_of(shards, preset="dense", lam=0.5, silent=1.0), expected)


def test_sparse_by_hand(make_shard_set: MakeSet) -> None:
    """Top half of 4 by |s|: 3 and the two tied 2s, so 3 tokens of weight 4/3; no signal: 0; a single token: 1."""
    shards = scored(make_shard_set, long_short=[[NAN, -2, 3, 0.5, 2], [NAN, 0, 0], [NAN, 0.125], [NAN]])
    expected = [[0, 4 / 3, 4 / 3, 0, 4 / 3], [0, 0, 0], [0, 1], [0]]
    assert_weights(weights_of(shards, preset="sparse", fraction=0.5), expected)
    expected[1] = [0, 1, 1]
    assert_weights(weights_of(shards, preset="sparse", fraction=0.5, silent=1.0), expected)


def test_longce_by_hand(make_shard_set: MakeSet) -> None:
    """min(e^s, gamma), not normalised."""
    shards = scored(make_shard_set, long_short=[[NAN, 0, 1, -1, 2, 60_000]])
    expected = [[0, 1, math.e, 1 / math.e, 5, 5]]
    assert_weights(weights_of(shards, preset="longce"), expected)
    assert_weights(weights_of(shards, preset="longce", gamma=2.0), [[0, 1, 2, 1 / math.e, 2, 2]])


def test_ppmi_and_npmi_by_hand(make_shard_set: MakeSet) -> None:
    """relu(short - long - log s) and relu(long - short - log s), each of mean 1 in its sequence; all zero: silent."""
    shards = scored(make_shard_set, long_short=[[NAN, 1, -1, 3, 0], [NAN, -2, 0], [NAN, 0, 0]])
    assert_weights(weights_of(shards, preset="ppmi"), [[0, 1, 0, 3, 0], [0, 0, 0], [0, 0, 0]])
    assert_weights(weights_of(shards, preset="npmi"), [[0, 0, 4, 0, 0], [0, 2, 0], [0, 0, 0]])
    shifted = weights_of(shards, preset="ppmi", s=math.exp(1), silent=0.5)
    assert_weights(shifted, [[0, 0, 0, 4, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])


def test_soft_threshold_by_hand(make_shard_set: MakeSet) -> None:
    """min(s / 2, 1) is 0, 0, 1/4, 1, 1: mean 9/20."""
    shards = scored(make_shard_set, excess_loss=[[NAN, -1, 0, 0.5], [NAN, 2, 5]])
    expected = [[0, 0, 0, 5 / 9], [0, 20 / 9, 20 / 9]]
    assert_weights(weights_of(shards, preset="soft-threshold", tau=2.0), expected)


def test_rewards_are_those_of_the_document(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, reward=[0.5, -1.0, 2.0])
    assert_weights(weights_of(shards, preset="reward"), [[0, 0.5, 0.5], [0, -1, -1], [0, 2, 2]])
    assert_weights(weights_of(shards, formula="relu(reward)"), [[0, 0.5, 0.5], [0, 0, 0], [0, 2, 2]])


@pytest.mark.parametrize(
    "config",
    [
        {"preset": "dense", "lam": 1.0},
        {"preset": "sparse", "fraction": 1.0},
        {"preset": "rho1-static", "fraction": 1.0, "column": "long_short"},
        {"preset": "self-reference-loss", "fraction": 1.0},
        {"preset": "self-reference", "fraction": 1.0},
        {"preset": "longce", "column": "loss_reference - loss_reference"},
        {"formula": "1"},
    ],
)
def test_limits_are_plain_cross_entropy(config: dict, make_shard_set: MakeSet) -> None:
    """Sequences of zeros included."""
    losses = [[NAN, 1, 2, 3], [NAN, 5, 5]]
    scores = {"loss_reference": losses, "entropy_reference": losses, "long_short": [[NAN, -1, 0, 2], [NAN, 0, 0]]}
    for row in weights_of(scored(make_shard_set, **scores), **config):
        assert row[1:] == [1.0] * (len(row) - 1)


def test_a_live_column_for_the_model_in_training(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_reference=[[NAN, 1, 1, 1]], loss_base=[[NAN, 3, 2, 1]])
    found = weights_of(shards, formula="clip(live - loss_reference, 0, 1.5)", live_column="loss_base")
    assert_weights(found, [[0, 1.5, 1, 0]])


def test_missing_column_names_the_ones_there_are(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([20, 20]),))
    with pytest.raises(UserError, match=r"no column 'loss_x' in .*/set \(columns: excess_loss, long_short\)"):
        make_weighting(WeightsConfig(preset="dense", column="loss_x"), shards)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "rho1", "column": "loss_none"}, "column 'loss_none' has no scores; choose another"),
        ({"preset": "dense", "column": "loss_none"}, "column 'loss_none' has no scores; choose another"),
        ({"preset": "sparse", "column": "zero"}, "column 'zero' has no value except 0"),
        (
            {"preset": "soft-threshold", "column": "negative"},
            "'negative' is never positive, so --weights are 0 for every token",
        ),
        ({"formula": "0"}, "are 0 for every token"),
        ({"formula": "(loss_a > 5) * 2"}, "are 0 for every token"),
        ({"formula": "1e38 * loss_a * 100"}, r"a weight overflows float32; limit it with clip\(\)"),
        ({"formula": "negative"}, r"may be negative, .* put relu\(\) or abs\(\)"),
        ({"formula": "loss_a - 1"}, "may be negative"),
        ({"formula": "normalise(negative)"}, r"normalise\(\) of values that may be negative"),
        ({"formula": "reward"}, "may be negative"),
        ({"formula": "relu(prompt)"}, "'prompt' holds labels, which have no numeric value"),
        ({"formula": "signed(standardise(loss_a, by=prompt))"}, "'loss_a' is not a column of document numbers"),
        ({"formula": "signed(standardise(reward, by=loss_a))"}, "'loss_a' is not a column of document labels"),
        ({"preset": "advantage", "group": "reward"}, "'reward' is not a column of document labels"),
    ],
)
def test_what_cannot_give_weights_is_refused(config: dict, message: str, make_shard_set: MakeSet) -> None:
    shards = scored(
        make_shard_set,
        loss_none=[[NAN] * 3],
        loss_a=[[NAN, 1, 2]],
        zero=[[NAN, 0, 0]],
        negative=[[NAN, -1, -1]],
        reward=[1.0],
        prompt=["a"],
    )
    with pytest.raises(UserError, match=message):
        make_weighting(WeightsConfig(**config), shards)


def test_a_weight_that_is_no_number_is_an_error(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 100, 2]], loss_b=[[NAN, 100, 2]])
    with pytest.raises(UserError, match=r"--weights.formula: a weight overflows float32"):
        weights_of(shards, formula="1e37 * loss_a * loss_b")


def test_the_uniform_weight_is_one_everywhere(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([5, 1]),))
    assert weights_of(shards) == [[1] * 5, [1]]
    assert make_weighting(WeightsConfig(), shards).columns == ()


def test_scores_of_a_real_set_have_corpus_mean_one(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([50, 1, 200, 30, 7, 400]),))
    flat = np.concatenate([flat_values(shards.first.read(i)["excess_loss"]) for i in range(2)])
    for preset in ("rho1-static", "soft-threshold"):
        weights = np.concatenate(weights_of(shards, preset=preset))
        assert weights[np.isfinite(flat)].mean() == pytest.approx(1, rel=1e-5)
        assert not weights[np.isnan(flat)].any()


def imported(shards: ZippedSets, name: str) -> ZippedSets:
    """The set with a column that counts as imported."""
    (only,) = shards.sets
    origin = Imported(files=(ImportedFile(name="a", sha256="0" * 64),), column=name)
    column = only.manifest.columns[name].model_copy(update={"origin": origin})
    manifest = only.manifest.model_copy(update={"columns": only.manifest.columns | {name: column}})
    return ZippedSets((ShardSet(only.path, manifest),))


def test_imported_columns_give_weights_like_any_other(make_shard_set: MakeSet) -> None:
    plain = scored(make_shard_set, loss_a=[[NAN, 1, 2, 3], [NAN, 0, 8]])
    config = {"formula": "normalise(loss_a)"}
    assert_weights(weights_of(imported(plain, "loss_a"), **config), weights_of(plain, **config))


def test_imported_columns_with_negative_values_need_a_formula_without(make_shard_set: MakeSet) -> None:
    """A loss is positive by what it is, an imported column by its values."""
    shards = imported(scored(make_shard_set, loss_a=[[NAN, 1, -2, 3]]), "loss_a")
    with pytest.raises(UserError, match="weights may be negative"):
        weights_of(shards, formula="loss_a")
    assert_weights(weights_of(shards, formula="relu(loss_a)"), [[0, 1, 0, 3]])
