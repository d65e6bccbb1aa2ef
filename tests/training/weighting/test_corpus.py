"""Thresholds, ranks and moments of a whole corpus, of document numbers and of labels."""

import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weighted_sets import NAN, MakeSet, assert_weights, scored, weights_of

from weighted_mtp.schemas.errors import UserError


def test_rho1_static_keeps_the_top_of_the_whole_corpus(make_shard_set: MakeSet) -> None:
    """Of scores -1 to 3 the top 60 % are 1, 2, 3: weight 5/3 each. NaN at position 0 has none."""
    shards = scored(make_shard_set, excess_loss=[[NAN, 3, -1], [NAN, 1], [NAN], [NAN, 0, 2]])
    weight = 5 / 3
    expected = [[0, weight, 0], [0, weight], [0], [0, 0, weight]]
    assert_weights(weights_of(shards, preset="rho1-static"), expected)


def test_ties_at_the_corpus_threshold_are_kept(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, excess_loss=[[NAN, 2, 1, 1], [NAN, 1, 0]])
    assert_weights(weights_of(shards, preset="rho1-static", fraction=0.4), [[0, 1.25, 1.25, 1.25], [0, 1.25, 0]])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 7), min_size=2, max_size=6), st.floats(0.1, 0.95), st.integers(0, 999))
def test_corpus_wide_schemes_against_sorting_the_corpus(
    make_shard_set: MakeSet, lengths: list[int], fraction: float, seed: int
) -> None:
    """Stored and derived contrasts agree. A derived one has no value counts, so the corpus is read."""
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


@pytest.mark.parametrize(("size", "shown"), [(20000.0, "8e+04"), (1e-9, "4e-09")])
def test_values_that_float16_cannot_tell_apart_are_refused(make_shard_set: MakeSet, size: float, shown: str) -> None:
    """Scores up to 4, multiplied by the number of the document."""
    shards = scored(make_shard_set, loss_a=[[NAN, 1, 4], [NAN, 2]], size=[size, size])
    for function in ("rank", "normalise"):
        message = re.escape(f"an expression of 'loss_a' and 'size' is {shown}, beyond float16")
        with pytest.raises(UserError, match=message):
            weights_of(shards, formula=f"{function}(loss_a * abs(size))")
    scaled = f"rank(loss_a * abs(size) * {1 / size})"
    assert_weights(weights_of(shards, formula=scaled), [[0, 1 / 3, 1], [0, 2 / 3]])


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
    """The second sequence continues the document of the first: rewards 1 and 3, not 1, 1 and 3."""
    shards = scored(make_shard_set, starts=[0, 3, 0], reward=[1.0, 1.0, 3.0], prompt=["a", "a", "a"])
    found = weights_of(shards, preset="advantage", group="prompt")
    assert [row[1] for row in found] == pytest.approx([-1, -1, 1])
