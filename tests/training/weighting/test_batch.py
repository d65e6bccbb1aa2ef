"""Weights by batch and live weights, worked out by hand."""

import numpy as np
import pytest
import torch
from weighted_sets import NAN, MakeSet, rows_of, scored

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.schemas.weights.nodes import ColumnRef
from weighted_mtp.schemas.weights.stages import StagedFormula
from weighted_mtp.training.loss.multi_head import HeadTargets
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting, LiveWeighting

RNG = np.random.default_rng(0)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]])


def live(share: float = 1.0, seed: int = 0, **settings: object) -> LiveWeighting:
    scheme = BatchWeighting.make(WeightsConfig(**settings)).live_weighting(share, np.random.default_rng(seed))
    assert scheme is not None
    return scheme


def test_by_batch_over_the_rows_of_a_step() -> None:
    """Top half of the 4 scored targets of both rows together; first tokens and padding are not targets."""
    values = [[[9], [1], [2], [NAN]], [[9], [3], [4], [0]]]
    rows = rows_of(values, [[0, 1, 2, 3], [0, 1, 2, 0]])
    weighting = BatchWeighting.make(WeightsConfig(formula="normalise(top(loss_a, 0.5, by=batch), by=batch)"))
    weights = weighting.weigh_rows(rows, 1.0, RNG).weights
    assert weights.tolist() == [[0, 0, 0, 0], [0, 2, 2, 0]]
    half = weighting.weigh_rows(rows, 0.5, RNG).weights
    assert half.tolist() == [[0, 0.5, 0.5, 0], [0, 1.5, 1.5, 0]]
    found = weighting.weigh_rows(rows, 1.0, RNG)
    assert found.silent.tolist() == [1, 0]


def test_by_batch_within_a_live_formula_compares_the_whole_step() -> None:
    config = WeightsConfig(formula="live * top(loss_a, 0.5, by=batch) * relu(long_short)")
    rows = rows_of([[[9, 9], [1, 5], [2, 6]], [[9, 9], [3, 7], [NAN, 8]]], [[0, 1, 2], [0, 1, 2]])
    found = BatchWeighting.make(config).weigh_rows(rows, 1.0, RNG).weights
    np.testing.assert_array_equal(found[0], [[NAN, NAN], [0, 5], [1, 6]])
    np.testing.assert_array_equal(found[1], [[NAN, NAN], [1, 7], [NAN, NAN]])


def test_warm_up_leaves_tokens_without_a_score_out(make_shard_set: MakeSet) -> None:
    shards = scored(make_shard_set, long_short=[[NAN, 2, 2, NAN]], excess_loss=[[NAN, 1, 0, NAN]])
    for preset in ("dense", "rho1-static"):
        config = WeightsConfig(preset=preset, warmup_ratio=0.5)
        weights = make_weighting(config, shards).weigh(shards.read(0, ["long_short", "excess_loss"], 0), RNG)
        rows = rows_of([weights.tolist()], [[0, 1, 2, 3]])
        assert BatchWeighting.make(config).weigh_rows(rows, 0.0, RNG).weights.tolist() == [[0, 1, 1, 0]]


def test_warm_up_moves_from_one_to_the_weights() -> None:
    rows = rows_of([[0, 3, 1]], [[0, 1, 2]])
    weighting = BatchWeighting.make(WeightsConfig(preset="rho1-static"))
    assert weighting.weigh_rows(rows, 0.0, RNG).weights.tolist() == [[1, 1, 1]]
    assert weighting.weigh_rows(rows, 0.25, RNG).weights.tolist() == [[0.75, 1.5, 1]]
    assert weighting.weigh_rows(rows, 1.0, RNG).weights.tolist() == [[0, 3, 1]]


def test_rho1_worked_by_hand() -> None:
    """Excess losses 1, -1, 3, 2: the two largest share the weight of all four."""
    losses, stored = torch.tensor([2.0, 1.0, 4.0, 5.0]), torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    weights = live(preset="rho1", fraction=0.5)(losses, stored, torch.ones(4, dtype=torch.int64))
    assert weights.tolist() == [0, 0, 2, 2]


def test_rho1_keeps_ties() -> None:
    scheme, documents = live(preset="rho1", fraction=0.3), torch.ones(10, dtype=torch.int64)
    losses = torch.tensor([1.0, 5, 5, 5, 5, 2, 9, 3, 4, 0])
    expected = [0, 2, 2, 2, 2, 0, 2, 0, 0, 0]
    assert scheme(losses, torch.zeros(10, 1), documents).tolist() == expected
    assert scheme(losses[:0], torch.zeros(0, 1), documents[:0]).tolist() == []
    everything = live(preset="rho1", fraction=1.0)
    assert everything(losses, torch.zeros(10, 1), documents).tolist() == [1.0] * 10


def test_warm_up_and_controls_of_live_weights() -> None:
    losses, documents = torch.arange(8.0), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    arguments = losses, torch.zeros(8, 1), documents
    weights = live(preset="rho1", fraction=0.5)(*arguments)
    assert weights.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert live(share=0.5, preset="rho1", fraction=0.5)(*arguments).tolist() == [0.5] * 4 + [1.5] * 4
    score = {"formula": "live", "control": "shuffled"}
    shuffled = live(**score)(*arguments)
    assert shuffled.tolist() == live(**score)(*arguments).tolist() != live(seed=1, **score)(*arguments).tolist()
    assert shuffled[:4].sort().values.tolist() == [0, 1, 2, 3]
    assert shuffled[4:].sort().values.tolist() == [4, 5, 6, 7]
    drawn = live(formula="live", control="random")(*arguments)
    assert drawn.min() > 0


def test_a_formula_of_live_losses_and_stored_columns() -> None:
    """Two stored components, and a live stage: the top half of live - a in each document, times b."""
    config = WeightsConfig(formula="top(live - loss_a, 0.5, by=sequence) * sigmoid(long_short)")
    stages = StagedFormula.split(config.node)
    assert stages.stored == (ColumnRef("loss_a"), parse_formula("sigmoid(long_short)"))
    assert stages.live is not None
    scheme = LiveWeighting(stages.live)
    stored = torch.tensor([[1.0, 0.25], [0.0, 0.5], [0.0, 0.75]])
    weights = scheme(torch.tensor([3.0, 1.0, 7.0]), stored, torch.tensor([0, 0, 4]))
    assert weights.tolist() == [0.25, 0, 0.75]


def test_dense_and_sparse_worked_by_hand() -> None:
    """Two documents. Distances 1, 3 (mean 2) and 4, 0, 2 (mean 2)."""
    losses, stored = torch.tensor([3.0, 1.0, 5.0, 2.0, 2.0]), torch.tensor([[2.0], [4.0], [1.0], [2.0], [4.0]])
    documents = torch.tensor([3, 3, 8, 8, 8])
    dense = live(preset="dense", live=True, lam=0.5)(losses, stored, documents)
    assert dense.tolist() == pytest.approx([0.75, 1.25, 1.5, 0.5, 1.0])
    sparse = live(preset="sparse", live=True, fraction=0.5)(losses, stored, documents)
    assert sparse.tolist() == pytest.approx([0, 2, 1.5, 0, 1.5])


@pytest.mark.parametrize("settings", [{"preset": "sparse", "fraction": 1.0}, {"preset": "dense", "lam": 1.0}])
def test_the_plain_end_of_each_scheme_is_uniform(settings: dict) -> None:
    losses, stored, documents = torch.rand(7), torch.rand(7, 1), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert live(live=True, **settings)(losses, stored, documents).tolist() == pytest.approx([1.0] * 7)


def test_thresholds_are_those_of_each_head() -> None:
    """All losses of a far head are larger; with a shared threshold only its tokens would be kept."""
    scheme = live(preset="rho1", fraction=0.5).for_batch(POSITIONS)
    rows = torch.tensor([0, 1, 2, 3])
    stored = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    for losses in (torch.tensor([2.0, 2.0, 4.0, 2.0]), torch.tensor([12.0, 12.0, 14.0, 12.0])):
        assert scheme(losses, HeadTargets(rows, rows, stored)).tolist() == [2, 0, 2, 0]
