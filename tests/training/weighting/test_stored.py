"""Every scheme on numbers worked out by hand from its paper, the limits that must be plain cross-entropy, the traps."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.weights.presets import PRESETS
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting
from weighted_mtp.training.weighting.controls import lognormal_like, shuffle_within

NAN = math.nan
RNG = np.random.default_rng(0)
MakeSet = Callable[..., ShardSet]


def scored(
    make_shard_set: MakeSet, name: str = "set", starts: list[int] | None = None, **columns: object
) -> ZippedSets:
    """A set with these columns: lists of lists are scores, flat lists belong to sequences."""
    scores = {key: rows for key, rows in columns.items() if isinstance(rows[0], list)}
    carried = {key: values for key, values in columns.items() if key not in scores}
    lengths = map(len, next(iter(scores.values()))) if scores else [3] * len(next(iter(carried.values())))
    sequences = [[1] * length for length in lengths]
    return ZippedSets((make_shard_set(sequences, scores, name, sequence_columns=carried, document_starts=starts),))


def weights_of(shards: ZippedSets, stand_in: str | None = None, **config: object) -> list[list[float]]:
    """The weights of each sequence."""
    weighting = make_weighting(WeightsConfig(**config), shards, stand_in)
    found = []
    for number, shard in enumerate(shards.first.manifest.shards):
        for row_group in range(shard.row_groups):
            table = shards.read(number, weighting.columns, row_group)
            weights = weighting.of_table(table, np.random.default_rng(number))
            assert weights.dtype == np.float32
            ends = np.cumsum(list_lengths(table["input_ids"]))
            found += [part.tolist() for part in np.split(weights, ends[:-1])]
    return found


def assert_weights(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for own, row in zip(found, expected, strict=True):
        assert own == pytest.approx(row, rel=1e-5, abs=1e-7)


def test_rho1_static_keeps_the_top_of_the_whole_corpus(make_shard_set: MakeSet) -> None:
    """Of scores -1 to 3 the top 60 % are 1, 2, 3: weight 5/3 each. NaN at position 0 has none."""
    shards = scored(make_shard_set, excess_loss=[[NAN, 3, -1], [NAN, 1], [NAN], [NAN, 0, 2]])
    weight = 5 / 3
    expected = [[0, weight, 0], [0, weight], [0], [0, 0, weight]]
    assert_weights(weights_of(shards, preset="rho1-static"), expected)


def test_ties_at_the_corpus_threshold_are_kept(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, excess_loss=[[NAN, 2, 1, 1], [NAN, 1, 0]])
    assert_weights(weights_of(shards, preset="rho1-static", fraction=0.4), [[0, 1.25, 1.25, 1.25], [0, 1.25, 0]])


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


def test_advantages_are_those_within_the_group(make_shard_set: MakeSet) -> None:
    """Group a: 1 and 3, mean 2, deviation 1. Group b: 0, 0, 3, mean 1, deviation sqrt 2. Group c: equal rewards, 0."""
    shards = scored(
        make_shard_set, reward=[1.0, 0.0, 3.0, 0.0, 3.0, 0.1, 0.1, 0.1], prompt=["a", "b", "a", "b", "b", "c", "c", "c"]
    )
    found = weights_of(shards, preset="advantage", group="prompt")
    root = math.sqrt(2)
    assert [row[1] for row in found] == pytest.approx([-1, -1 / root, 1, -1 / root, 2 / root, 0, 0, 0], abs=1e-6)
    assert {row[0] for row in found} == {0}
    assert all(row[1] == row[2] for row in found)


def test_a_document_in_several_sequences_counts_once_in_its_group(make_shard_set: MakeSet) -> None:
    """The second sequence goes on with the first one's document: rewards 1 and 3, not 1, 1 and 3."""
    shards = scored(make_shard_set, starts=[0, 3, 0], reward=[1.0, 1.0, 3.0], prompt=["a", "a", "a"])
    found = weights_of(shards, preset="advantage", group="prompt")
    assert [row[1] for row in found] == pytest.approx([-1, -1, 1])


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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 7), min_size=2, max_size=6), st.floats(0.1, 0.95), st.integers(0, 999))
def test_corpus_wide_schemes_against_sorting_the_corpus(
    make_shard_set: MakeSet, lengths: list[int], fraction: float, seed: int
) -> None:
    """Stored and derived contrasts alike: of the derived one no statistics exist, so the corpus is read."""
    rng = np.random.default_rng(seed)
    base, reference = ([[NAN, *(rng.integers(0, 9, n - 1) / 4)] for n in lengths] for _ in range(2))
    excess = [np.subtract(b, r).tolist() for b, r in zip(base, reference, strict=True)]
    flat = np.concatenate(excess)
    finite = flat[np.isfinite(flat)]
    if any(not np.concatenate([row[1:] for row in rows]).any() for rows in (base, reference, excess)):
        return
    shards = scored(make_shard_set, name=f"set-{rng.integers(1 << 60)}", loss_a=base, loss_b=reference, excess=excess)
    threshold = np.sort(finite)[::-1][int(np.ceil(fraction * len(finite) - 1e-9)) - 1]
    kept = np.where(np.isnan(flat), 0, flat >= threshold)
    expected = np.split(kept / kept.sum() * len(finite), np.cumsum(lengths)[:-1])
    for column in ("excess", "loss_a - loss_b"):
        found = weights_of(shards, preset="rho1-static", column=column, fraction=fraction)
        assert_weights(found, [row.tolist() for row in expected])
    ranks = [[(finite <= score).mean() if score == score else 0 for score in row] for row in excess]
    assert_weights(weights_of(shards, formula="rank(loss_a - loss_b)"), ranks)
    if finite.std():
        centred = [[(s - finite.mean()) / finite.std() if s == s else 0 for s in row] for row in excess]
        assert_weights(weights_of(shards, formula="signed(standardise(excess))"), centred)
    else:
        with pytest.raises(UserError, match="0 for every token"):
            weights_of(shards, formula="signed(standardise(excess))")
    softmax = [[math.exp(s) / np.exp(finite).mean() if s == s else 0 for s in row] for row in excess]
    assert_weights(weights_of(shards, formula="softmax(excess)"), softmax)


def test_composed_formulas_by_hand(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 1, 2, 4]], loss_b=[[NAN, 2, 0, 1]], s=[[NAN, -1, 0, 1]])
    cases = {
        "loss_a / loss_b": [0, 0.5, 0, 4],  # a quotient by nothing is no signal
        "loss_a * loss_b": [0, 2, 0, 4],
        "0.25 * loss_a + 0.75 * loss_b": [0, 1.75, 0.5, 1.75],
        "s > 0": [0, 0, 0, 1],
        "s <= 0": [0, 1, 1, 0],
        "loss_a >= loss_b": [0, 0, 1, 1],
        "sigmoid(s) * 2": [0, 2 / (1 + math.e), 1, 2 / (1 + 1 / math.e)],
        "exp(shift(s, 1))": [0, 1, math.e, math.e**2],
        "clip(scale(s, 3), 0, 2)": [0, 0, 0, 2],
        "relu(negate(s))": [0, 1, 0, 0],
        "abs(s)": [0, 1, 0, 1],
        "rank(s, by=sequence)": [0, 1 / 3, 2 / 3, 1],
        "signed(standardise(loss_b, by=sequence))": [0, math.sqrt(1.5), -math.sqrt(1.5), 0],
        "softmax(s, by=sequence)": [0, *(3 * np.exp([-1, 0, 1]) / np.exp([-1, 0, 1]).sum())],
        "interpolate(normalise(loss_a, by=sequence), 0.5)": [0, 5 / 7, 13 / 14, 19 / 14],
        "top(loss_a + loss_b, 0.3, by=sequence) * abs(s)": [0, 0, 0, 1],
        "exp(100 * loss_a)": [0, *[math.exp(11)] * 3],
    }
    for formula, expected in cases.items():
        assert_weights(weights_of(shards, formula=formula), [expected])


def test_zeros_are_never_among_the_top_of_magnitudes(make_shard_set: MakeSet) -> None:
    """Where the short context is the whole, long_short is 0: ties at a threshold of 0 would keep every token."""
    scores = [[NAN, 0, 0, 0, 0, 0, 1, 2, -3, 4, 5], [NAN, 0, 0, 0, 1]]
    shards = scored(make_shard_set, long_short=scores)
    expected = [[0] * 6 + [2] * 5, [0, 0, 0, 0, 4]]
    assert_weights(weights_of(shards, preset="sparse"), expected)
    positive = [[0] * 6 + [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert_weights(weights_of(shards, formula="top(relu(long_short), 0.6)"), positive)
    signed = [[float(s >= 0) if s == s else 0 for s in row] for row in scores]
    assert_weights(weights_of(shards, formula="top(long_short, 0.6)"), signed)  # here 0 is a score like others


def test_numbers_of_documents_over_the_corpus(make_shard_set: MakeSet) -> None:
    """Every document has two targets. Numbers are not rounded, however large."""
    shards = scored(make_shard_set, reward=[5000.0, 5001.0, 1e6, 5000.5])
    cases = {
        "top(reward, 0.5)": [0, 1, 1, 0],
        "rank(reward)": [0.25, 0.75, 1, 0.5],
        "rank(2 * reward) * 2": [0.5, 1.5, 2, 1],
        "normalise(relu(reward - 5000))": [0, 4 / 995001.5, 4 * 995000 / 995001.5, 2 / 995001.5],
        "signed(standardise(clip(reward, 0, 5001)))": [-5 / 11**0.5, 3 / 11**0.5, 3 / 11**0.5, -1 / 11**0.5],
        "softmax(clip(reward, 5000, 5001))": (np.exp([0, 1, 1, 0.5]) / np.exp([0, 1, 1, 0.5]).mean()).tolist(),
    }
    for formula, expected in cases.items():
        assert_weights(weights_of(shards, formula=formula), [[0, value, value] for value in expected])
    assert_weights(
        weights_of(shards, preset="rho1-static", column="reward", fraction=0.25),
        [[0, 0, 0]] * 2 + [[0, 4, 4], [0, 0, 0]],
    )


def test_a_token_needs_all_scores_that_its_weight_is_made_of(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_a=[[NAN, 1, NAN, 3]], loss_b=[[NAN, 2, 3, NAN]])
    assert_weights(weights_of(shards, formula="loss_a + loss_b"), [[0, 3, 0, 0]])
    assert_weights(weights_of(shards, formula="normalise(loss_a + loss_b)"), [[0, 1, 0, 0]])


def test_a_stand_in_for_the_model_in_training(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, loss_reference=[[NAN, 1, 1, 1]], loss_base=[[NAN, 3, 2, 1]])
    found = weights_of(shards, formula="clip(live - loss_reference, 0, 1.5)", stand_in="loss_base")
    assert_weights(found, [[0, 1.5, 1, 0]])


def test_several_columns_are_zipped(make_shard_set: MakeSet) -> None:
    one = scored(make_shard_set, name="one", loss_a=[[NAN, 1, 2], [NAN, 4]])
    other = scored(make_shard_set, name="other", loss_b=[[NAN, 2, 2], [NAN, 0]])
    shards = ZippedSets((*one.sets, *other.sets))
    assert_weights(weights_of(shards, formula="relu(loss_a - loss_b)"), [[0, 0, 0], [0, 4]])


def rows_of(weights: list[list[list[float]]], positions: list[list[int]]) -> Rows:
    """Packed rows with (B, L, parts) values."""
    nothing = np.zeros(len(positions), dtype=np.int64)
    values = np.array(weights, np.float32)
    return Rows(np.array(positions, np.int32), np.array(positions, np.int32), values, nothing, nothing, nothing)


def test_by_batch_over_the_rows_of_a_step() -> None:
    """Top half of the 4 targets that have a score, in both rows together; first tokens and padding are none."""
    values = [[[9], [1], [2], [NAN]], [[9], [3], [4], [0]]]
    rows = rows_of(values, [[0, 1, 2, 3], [0, 1, 2, 0]])
    weighting = BatchWeighting.make(WeightsConfig(formula="normalise(top(loss_a, 0.5, by=batch), by=batch)"))
    weights = weighting.of_rows(rows, 1.0, RNG).weights
    assert weights.tolist() == [[0, 0, 0, 0], [0, 2, 2, 0]]
    half = weighting.of_rows(rows, 0.5, RNG).weights
    assert half.tolist() == [[0, 0.5, 0.5, 0], [0, 1.5, 1.5, 0]]
    found = weighting.of_rows(rows, 1.0, RNG)
    assert found.silent.tolist() == [1, 0]


def test_by_batch_inside_of_a_live_formula_is_done_over_the_step_too() -> None:
    config = WeightsConfig(formula="live * top(loss_a, 0.5, by=batch) * relu(long_short)")
    rows = rows_of([[[9, 9], [1, 5], [2, 6]], [[9, 9], [3, 7], [NAN, 8]]], [[0, 1, 2], [0, 1, 2]])
    found = BatchWeighting.make(config).of_rows(rows, 1.0, RNG).weights
    np.testing.assert_array_equal(found[0], [[NAN, NAN], [0, 5], [1, 6]])
    np.testing.assert_array_equal(found[1], [[NAN, NAN], [1, 7], [NAN, NAN]])


def test_warm_up_leaves_tokens_without_a_score_out(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, long_short=[[NAN, 2, 2, NAN]], excess_loss=[[NAN, 1, 0, NAN]])
    for preset in ("dense", "rho1-static"):
        config = WeightsConfig(preset=preset, warmup_ratio=0.5)
        weights = make_weighting(config, shards).of_table(shards.read(0, ["long_short", "excess_loss"], 0), RNG)
        rows = rows_of([weights.tolist()], [[0, 1, 2, 3]])
        assert BatchWeighting.make(config).of_rows(rows, 0.0, RNG).weights.tolist() == [[0, 1, 1, 0]]


def test_warm_up_moves_from_one_to_the_weights() -> None:
    rows = rows_of([[0, 3, 1]], [[0, 1, 2]])
    weighting = BatchWeighting.make(WeightsConfig(preset="rho1-static"))
    assert weighting.of_rows(rows, 0.0, RNG).weights.tolist() == [[1, 1, 1]]
    assert weighting.of_rows(rows, 0.25, RNG).weights.tolist() == [[0.75, 1.5, 1]]
    assert weighting.of_rows(rows, 1.0, RNG).weights.tolist() == [[0, 3, 1]]


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


def test_missing_column_names_the_ones_there_are(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([20, 20]),))
    with pytest.raises(UserError, match=r"no column 'loss_x' in .*/set \(columns: excess_loss, long_short\)"):
        make_weighting(WeightsConfig(preset="dense", column="loss_x"), shards)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "rho1", "column": "loss_none"}, "column 'loss_none' has no score at all; choose another"),
        ({"preset": "dense", "column": "loss_none"}, "column 'loss_none' has no score at all; choose another"),
        ({"preset": "sparse", "column": "zero"}, "column 'zero' has no value but 0"),
        ({"preset": "soft-threshold", "column": "negative"}, "0 for every token, as nothing of 'negative' is positive"),
        ({"formula": "0"}, "are 0 for every token"),
        ({"formula": "(loss_a > 5) * 2"}, "are 0 for every token"),
        ({"formula": "1e38 * loss_a * 100"}, r"too large to be a number; put clip\(\)"),
        ({"formula": "negative"}, r"may be negative, .* put relu\(\) or abs\(\)"),
        ({"formula": "loss_a - 1"}, "may be negative"),
        ({"formula": "normalise(negative)"}, r"normalise\(\) of what may be negative"),
        ({"formula": "reward"}, "may be negative"),
        ({"formula": "relu(prompt)"}, "'prompt' holds labels, of which no weight can be made"),
        ({"formula": "signed(standardise(loss_a, by=prompt))"}, "'loss_a' is no column of numbers of documents"),
        ({"formula": "signed(standardise(reward, by=loss_a))"}, "'loss_a' is no column of labels of documents"),
        ({"preset": "advantage", "group": "reward"}, "'reward' is no column of labels of documents"),
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
    with pytest.raises(UserError, match=r"--weights.formula: a weight is too large"):
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
