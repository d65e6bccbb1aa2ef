"""Shaped rewards of the next token against numbers worked out by hand, and against autograd on full logits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import logged
from pydantic import ValidationError
from torch import Tensor

from weighted_mtp.schemas.configs import HeadsConfig, ObjectiveConfig, TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.loss.objectives import CrossEntropy, DiversityOrPrecision, Objective, make_objective
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting.batch import LiveWeighting

SETTINGS: list[dict[str, Any]] = [
    {"beta": -0.25},
    {"beta": 0.5},
    {"beta": 0.0, "lambda_tail": -0.1, "top_k": 3},
    {"beta": -0.5, "lambda_top": 0.3, "lambda_tail": -0.2, "top_k": 4},
    {"beta": 0.0, "lambda_top": 0.2, "lambda_tail": 0.2, "top_k": 2},
    {"beta": 1.0, "lambda_top": -0.4, "top_k": 100},
]


def inputs(rows: int = 29, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, bias, targets and weights, some of them negative."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 8), (vocabulary, 8), (vocabulary,))
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return *leaves, targets, torch.randn(rows, generator=generator, dtype=torch.float64)  # type: ignore[return-value]


def plain(logits: Tensor, target: Tensor, objective: DiversityOrPrecision) -> Tensor:
    """The surrogate of one row, written down directly; autograd differentiates it."""
    p = logits.softmax(-1)
    order = p.detach().argsort(descending=True).tolist()
    x = int(target)
    top = [v for v in order[: objective.top_k] if v != x]
    tail = [v for v in order[objective.top_k :] if v != x]
    reward = (1 - p[x]).detach() ** objective.beta
    shaped = objective.lambda_top * sum((p[v] for v in top), torch.zeros(())) + objective.lambda_tail * sum(
        (p[v] for v in tail), torch.zeros(())
    )
    return -(reward * p[x].log() + shaped)


def test_worked_by_hand() -> None:
    """Probabilities .4 .3 .2 .1, the target is the second: top 2 leaves .4 besides it, the tail has .3.

    Value: -.7 ln .3 - .5 * .4 + 1 * .3. Gradient of logit j: `-.7 (1[x] - p) - .5 p (1[top] - .4) + p (1[tail] - .3)`.
    """
    matrix = torch.tensor([[4.0], [3.0], [2.0], [1.0]]).log().requires_grad_()
    objective = DiversityOrPrecision(beta=1.0, lambda_top=0.5, lambda_tail=-1.0, top_k=2)
    value, losses = weighted_linear_cross_entropy(
        torch.ones(1, 1), matrix, torch.tensor([1]), torch.ones(1), objective=objective
    )
    assert value.item() == pytest.approx(-0.7 * math.log(0.3) - 0.2 + 0.3)
    assert losses.tolist() == pytest.approx([-math.log(0.3)])
    value.backward()
    assert matrix.grad is not None
    assert matrix.grad.flatten().tolist() == pytest.approx([0.04, -0.52, 0.32, 0.16])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [4, 1000])
def test_equals_autograd_in_float64(settings: dict[str, Any], softcap: float | None, chunk_rows: int) -> None:
    hidden, matrix, bias, targets, weights = inputs()
    objective = DiversityOrPrecision(**settings)
    value, losses = weighted_linear_cross_entropy(
        hidden, matrix, targets, weights, bias=bias, softcap=softcap, chunk_rows=chunk_rows, objective=objective
    )
    logits = hidden @ matrix.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = sum(
        (w * plain(row, x, objective) for row, x, w in zip(logits, targets, weights, strict=True)), torch.zeros(())
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none").detach())
    leaves = (hidden, matrix, bias)
    for own, reference in zip(
        torch.autograd.grad(3 * value, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-12)


def test_without_rewards_it_is_cross_entropy() -> None:
    hidden, matrix, bias, targets, weights = inputs()
    leaves = (hidden, matrix, bias)
    found = []
    for objective in (CrossEntropy(), DiversityOrPrecision(beta=0.0)):
        value, losses = weighted_linear_cross_entropy(hidden, matrix, targets, weights, bias=bias, objective=objective)
        found.append((value.detach(), losses, *torch.autograd.grad(value, leaves)))
    for own, reference in zip(*found, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_ties_at_the_border_do_not_change_the_value(top_k: int) -> None:
    """Five equal logits: `top_k` of them are top, and one of those may be the target."""
    logits = torch.zeros(5, 5)
    chunk = DiversityOrPrecision(beta=0.0, lambda_top=1.0, top_k=top_k)(logits, torch.arange(5))
    in_top = math.log(5) - (top_k - 1) / 5, math.log(5) - top_k / 5
    values = sorted(chunk.objective_losses.tolist())
    assert values == pytest.approx(sorted([in_top[0]] * top_k + [in_top[1]] * (5 - top_k)))
    torch.testing.assert_close(chunk.gradient(torch.ones(5)).sum(-1), torch.zeros(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [-1.0, -0.25, 0.5])
def test_a_target_that_is_certain_or_impossible_gives_finite_numbers(beta: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    chunk = DiversityOrPrecision(beta=beta, lambda_tail=-0.1, top_k=1)(logits, torch.tensor([0, 0]))
    assert chunk.token_losses.tolist() == [0, 200]
    assert chunk.objective_losses.tolist() == pytest.approx([0, 200])
    grad = chunk.gradient(torch.ones(2))
    assert grad[0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert grad[1].tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("beta", [-1.0, -0.25, 0.0, 0.5])
@pytest.mark.parametrize("target", [0, 3])
def test_gradients_of_confident_tokens_keep_their_digits(beta: float, target: int) -> None:
    """1 - p from e^-8 to e^-22, and p as small: float32 against float64 on the same logits."""
    margins = torch.tensor([8.0, 12.0, 15.0, 16.0, 17.0, 22.0])
    logits = torch.stack([margins, torch.zeros(6), torch.zeros(6) - 1, torch.zeros(6) - 2], dim=1)
    objective = DiversityOrPrecision(beta, lambda_top=0.3, lambda_tail=-0.2, top_k=2)
    own, exact = (
        objective(of, torch.full((6,), target)).gradient(torch.full((6,), 2.0, dtype=of.dtype))
        for of in (logits.clone(), logits.double())
    )
    torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("heads", [{"block": "residual"}, {"block": "decoder"}, {"kind": "sequential"}])
def test_every_head_is_shaped_and_without_rewards_trains_as_ever(
    heads: dict[str, Any], model_dir: Callable[..., Path]
) -> None:
    model = build_model(str(model_dir("gemma2")), HeadsConfig(offsets=(1, 3), **heads), from_scratch=False)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]])
    ids = torch.arange(10)[None] * 7
    weights = torch.rand(1, 10, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())

    def run(objective: Objective | None) -> list[Tensor]:
        loss, sums = model(ids, positions, weights, objective=objective)
        return [loss.detach(), *sums, *torch.autograd.grad(loss, parameters)]

    reference, plain_end, shaped = run(None), run(DiversityOrPrecision(0.0)), run(DiversityOrPrecision(-0.25))
    for own, expected in zip(plain_end, reference, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=5e-6)
    assert (shaped[1] > reference[1]).all()  # weighted losses: rewards are above 1
    torch.testing.assert_close(shaped[2:7], reference[2:7])  # the other sums


def test_live_weights_rank_by_likelihood_and_only_selected_rows_are_shaped(model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    positions, ids = torch.arange(20)[None], torch.arange(20)[None] * 11 % 256
    stored = torch.full((1, 20), 5.0)
    live = LiveWeighting(parse_formula("normalise(top(live, 0.5), by=batch)"))
    reference = model(ids, positions, stored[..., None], live=live)[1]
    loss, sums = model(
        ids, positions, stored[..., None], live=live, objective=DiversityOrPrecision(0.0, lambda_tail=-1.0)
    )
    torch.testing.assert_close(sums[1:], reference[1:])
    assert (sums.weighted_loss > reference.weighted_loss).all()
    torch.testing.assert_close(loss.detach(), sums.weighted_loss.sum())


def test_negative_live_weights_push_away_and_rows_of_weight_zero_are_left_out() -> None:
    hidden, matrix, _, targets, _ = inputs(rows=6)
    signs = torch.tensor([1.0, -2.0, 0.0, 0.0, -1.0, 3.0], dtype=torch.float64)
    task = HeadTargets(torch.arange(6), targets, torch.zeros(6))
    result = multi_head_cross_entropy(
        [hidden],
        [HeadGroup([0], lambda tensors, rows: [tensors[0]])],
        [task],
        matrix,
        torch.ones(1, dtype=torch.float64),
        live=lambda losses, _: signs,
        objective=DiversityOrPrecision(beta=0.5),
    )
    p = (hidden @ matrix.T).softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    values = -((1 - p).detach() ** 0.5) * p.log()
    torch.testing.assert_close(result.total, values @ signs)
    torch.testing.assert_close(result.objective_losses, torch.where(signs == 0, 0, values.detach()))
    torch.testing.assert_close(result.token_losses, -p.log().detach())
    leaves = (hidden, matrix)
    for own, reference in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(values @ signs, leaves), strict=True
    ):
        torch.testing.assert_close(own, reference)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": -0.25}, "need --objective.kind diversity_or_precision"),
        ({"lambda_tail": -0.1}, "need --objective.kind diversity_or_precision"),
        ({"top_k": 5}, "need --objective.kind diversity_or_precision"),
        ({"kind": "diversity_or_precision", "top_k": 5}, "--objective.top_k needs"),
        ({"kind": "diversity_or_precision", "beta": -1.5}, "greater than or equal to -1"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ObjectiveConfig(**settings)


def test_defaults_are_those_of_the_paper() -> None:
    assert isinstance(make_objective(ObjectiveConfig()), CrossEntropy)
    objective = make_objective(ObjectiveConfig(kind="diversity_or_precision", lambda_tail=-0.1))
    assert isinstance(objective, DiversityOrPrecision)
    assert (objective.beta, objective.lambda_top, objective.lambda_tail, objective.top_k) == (-0.25, 0, -0.1, 100)


def test_training_logs_likelihood_and_what_is_minimised(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> None:
    shards = scored_set([40, 90, 7, 120, 33, 64, 80, 55])
    config = TrainConfig(
        input=shards.path,
        eval_input=shards.path,
        model=str(model_dir()),
        output=tmp_path / "run",
        heads={"offsets": (1, 2)},
        objective={"kind": "diversity_or_precision", "beta": -0.25, "lambda_tail": -0.1, "top_k": 5},
        optimizer={"learning_rate": 1e-2},
        sequence_length=64,
        batch_size=4,
        max_steps=12,
        log_every=1,
    )
    summary = train(config)
    lines = logged(config)[:12]
    assert all(line["weighted_loss_1"] > line["plain_loss_1"] for line in lines)
    assert lines[-1]["plain_loss_1"] < lines[0]["plain_loss_1"]
    assert summary["eval_loss_1"] < lines[0]["plain_loss_1"]
