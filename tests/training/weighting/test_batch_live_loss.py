"""Loss and gradients of live weights, against a plain computation from full logits."""

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
from weighted_mtp.training.loss.chunked_loss import ChunkedLoss
from weighted_mtp.training.loss.normalizer import count_targets
from weighted_mtp.training.loss.shifted_targets import select_targets
from weighted_mtp.training.model.mtp_model import MTPModel, build_model
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting.batch import BatchWeighting, LiveWeighting

pytestmark = pytest.mark.integration

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]])
IDS = torch.arange(24).reshape(2, 12) * 11 % 256


def live(share: float = 1.0, seed: int = 0, **settings: object) -> LiveWeighting:
    scheme = BatchWeighting.make(WeightsConfig(**settings)).live_weighting(share, np.random.default_rng(seed))
    assert scheme is not None
    return scheme


def stored_scores() -> Tensor:
    """A stored loss for every token but the first of a document, (2, 12, 1); one of them is missing."""
    scores = torch.rand(POSITIONS.shape, generator=torch.Generator().manual_seed(0)) * 3 + 4
    scores[POSITIONS == 0] = math.nan
    scores[0, 3] = math.nan
    return scores[..., None]


def plain_live_loss(model: MTPModel, scores: Tensor, scheme: LiveWeighting) -> Tensor:
    """Every loss from full logits, ranked for each head separately, then the weighted sum."""
    total = torch.zeros(())
    hidden = model.trunk.get_decoder()(input_ids=IDS, position_ids=POSITIONS, use_cache=False).last_hidden_state
    documents = (POSITIONS == 0).cumsum(1) + 100 * torch.arange(2)[:, None]
    for i, (k, c) in enumerate(zip(model.heads_config.offsets, model.heads_config.loss_coefficients, strict=True)):
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
