"""Live contrasts: weights from what the model loses now, against the definition written down plainly."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import logged
from torch import Tensor

from weighted_mtp.schemas.configs import HeadsConfig, TrainConfig, WeightsConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.weights.language import Column, Stages, parse
from weighted_mtp.training.loss.chunked_loss import ChunkedLoss
from weighted_mtp.training.loss.multi_head import HeadTargets
from weighted_mtp.training.loss.shifted_targets import count_targets, select_targets
from weighted_mtp.training.model.mtp_model import MTPModel, build_model
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting.batch import BatchWeighting, LiveWeighting

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]])
IDS = torch.arange(24).reshape(2, 12) * 11 % 256


def live(share: float = 1.0, seed: int = 0, **settings: object) -> LiveWeighting:
    scheme = BatchWeighting.make(WeightsConfig(**settings)).live_weights(share, np.random.default_rng(seed))
    assert scheme is not None
    return scheme


def stored_scores() -> Tensor:
    """A stored loss for every token but the first of a document, (2, 12, 1); one of them is missing."""
    scores = torch.rand(POSITIONS.shape, generator=torch.Generator().manual_seed(0)) * 3 + 4
    scores[POSITIONS == 0] = math.nan
    scores[0, 3] = math.nan
    return scores[..., None]


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
    """Two parts that the loader makes, and what only the step can: top half of live - a in each document, times b."""
    config = WeightsConfig(formula="top(live - loss_a, 0.5, by=sequence) * sigmoid(long_short)")
    stages = Stages.of(config.node)
    assert stages.stored == (Column("loss_a"), parse("sigmoid(long_short)"))
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


def plain_live_loss(model: MTPModel, scores: Tensor, scheme: LiveWeighting) -> Tensor:
    """Every loss from full logits, ranked for each head by itself, then the weighted sum."""
    total = torch.zeros(())
    hidden = model.trunk.get_decoder()(input_ids=IDS, position_ids=POSITIONS, use_cache=False).last_hidden_state
    documents = (POSITIONS == 0).cumsum(1) + 100 * torch.arange(2)[:, None]
    for i, (k, c) in enumerate(zip(model.config.offsets, model.config.loss_coefficients, strict=True)):
        states = hidden if i == 0 else model.heads[i - 1](hidden)
        log_probabilities = model.trunk.get_output_embeddings()(states).log_softmax(-1)
        places = [
            (row, t)
            for row in range(2)
            for t in range(12 - k)
            if POSITIONS[row, t + k] == POSITIONS[row, t] + k and not scores[row, t + k].isnan().any()
        ]
        losses = torch.stack([-log_probabilities[row, t, IDS[row, t + k]] for row, t in places])
        stored = torch.stack([scores[row, t + k] for row, t in places])
        document = torch.stack([documents[row, t] for row, t in places])
        total = total + c * (scheme(losses.detach(), stored, document) * losses).sum()
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "rho1", "fraction": 0.4},
        {"preset": "sparse", "live": True, "fraction": 0.3},
        {"preset": "dense", "live": True, "lam": 0.2},
    ],
)
def test_loss_and_gradients_equal_full_logits(settings: dict, model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 3), coefficients=(1.0, 0.5)), from_scratch=False)
    torch.nn.init.normal_(model.heads[0].linear.weight, std=0.2)
    scheme, scores = live(**settings), stored_scores()
    loss, sums = model(IDS, POSITIONS, scores, live=scheme)
    expected = plain_live_loss(model, scores, scheme)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    for own, reference in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-4)
    candidates = count_targets(POSITIONS, scores, 1, scored=True)[1]
    assert sums.weight[0].item() == pytest.approx(candidates.item())  # weights of mean 1


@pytest.mark.parametrize("heads", [{"block": "residual"}, {"block": "decoder"}, {"kind": "sequential"}])
@pytest.mark.parametrize(
    "settings", [{"preset": "rho1", "fraction": 1.0}, {"preset": "dense", "live": True, "lam": 1.0}]
)
def test_plain_ends_equal_uniform_weights_for_all_heads(
    settings: dict, heads: dict, model_dir: Callable[..., Path]
) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2, 4), **heads), from_scratch=False)
    scores = stored_scores()
    parameters = list(model.parameters())
    found = []
    for weights, scheme in ((scores, live(**settings)), (scores.isfinite().float().squeeze(-1), None)):
        loss, _ = model(IDS, POSITIONS, weights, live=scheme)
        found.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)


def test_only_selected_rows_pay_for_gradients(model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    with_gradients = []
    run = ChunkedLoss.losses_and_gradients

    def counted(self: ChunkedLoss, hidden: Tensor, targets: Tensor, weights: Tensor) -> object:
        with_gradients.append(len(targets))
        return run(self, hidden, targets, weights)

    monkeypatch.setattr(ChunkedLoss, "losses_and_gradients", counted)
    scores = stored_scores()
    model(IDS, POSITIONS, scores, live=live(preset="rho1", fraction=0.25))
    candidates = [len(select_targets(IDS, POSITIONS, scores, k, scored=True).rows) for k in (1, 2)]
    assert with_gradients == [math.ceil(count / 4) for count in candidates]


def test_thresholds_are_those_of_each_head() -> None:
    """Losses of a far head are larger throughout; by a shared threshold it would take every place."""
    scheme = live(preset="rho1", fraction=0.5).of_batch(POSITIONS)
    rows = torch.tensor([0, 1, 2, 3])
    stored = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    for losses in (torch.tensor([2.0, 2.0, 4.0, 2.0]), torch.tensor([12.0, 12.0, 14.0, 12.0])):
        assert scheme(losses, HeadTargets(rows, rows, stored)).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("normalization", ["tokens", "weight_sum"])
@pytest.mark.parametrize(
    "weights", [{"preset": "rho1", "column": "long_short"}, {"preset": "dense", "live": True, "column": "excess_loss"}]
)
def test_training_with_live_weights(
    weights: dict,
    normalization: str,
    tmp_path: Path,
    model_dir: Callable[..., Path],
    scored_set: Callable[..., ShardSet],
) -> None:
    shards = scored_set([40, 90, 7, 120, 33, 64, 80, 55])
    config = TrainConfig(
        input=shards.path,
        model=str(model_dir()),
        output=tmp_path / "run",
        weights=weights,
        heads={"offsets": (1, 2)},
        normalization=normalization,
        optimizer={"learning_rate": 1e-2},
        sequence_length=64,
        batch_size=4,
        max_steps=12,
        log_every=1,
    )
    summary = train(config)
    lines = logged(config)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert summary["selected_share"] == pytest.approx(0.6 if weights["preset"] == "rho1" else 1.0, abs=0.02)
    assert summary["bad_steps"] == summary["no_signal_steps"] == 0
