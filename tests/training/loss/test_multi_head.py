"""The weighted linear cross-entropy against PyTorch's own, value and gradients."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.loss.objectives import CrossEntropy, DiversityOrPrecision, Objective
from weighted_mtp.training.loss.token_order import TokenOrder


def inputs(dtype: torch.dtype, rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, matrix, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((rows, 8), (11, 8), (11,))
    )
    targets = torch.randint(0, 11, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) - 0.3  # rewards and advantages may be negative
    return hidden, matrix, bias, targets, weights.to(dtype)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
def test_equals_autograd_in_float64(softcap: float | None, chunk_rows: int) -> None:
    hidden, matrix, bias, targets, weights = inputs(torch.float64)
    loss, losses = weighted_linear_cross_entropy(
        hidden, matrix, targets, weights, bias=bias, softcap=softcap, chunk_rows=chunk_rows
    )
    logits = hidden @ matrix.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected_losses = cross_entropy(logits, targets, reduction="none")
    expected = (expected_losses * weights).sum()
    torch.testing.assert_close(losses, expected_losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    leaves = (hidden, matrix, bias)
    for own, reference in zip(
        torch.autograd.grad(2.5 * loss, leaves), torch.autograd.grad(2.5 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-12)


class Repeatable(torch.autograd.Function):
    """The operation for `gradcheck`, which differentiates a result many times: its gradients, taken once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, matrix, bias)]
        with torch.enable_grad():
            loss, _ = weighted_linear_cross_entropy(
                leaves[0], leaves[1], *rest[:2], bias=leaves[2], softcap=rest[2], objective=rest[3]
            )
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * own for own in ctx.saved_tensors), None, None, None, None


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(),
        DiversityOrPrecision(beta=0.0, lambda_top=0.3, lambda_tail=-0.2, top_k=4),
        TokenOrder(torch.arange(12)[None] % 11, torch.arange(12)[None], window=3),
    ],
)
def test_gradcheck(objective: Objective, softcap: float | None) -> None:
    hidden, matrix, bias, targets, weights = inputs(torch.float64, rows=5)
    assert torch.autograd.gradcheck(Repeatable.apply, (hidden, matrix, bias, targets, weights, softcap, objective))


def test_gradients_are_handed_out_once() -> None:
    hidden, matrix, _, targets, weights = inputs(torch.float32)
    loss, _ = weighted_linear_cross_entropy(hidden, matrix, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward pass already used"):
        loss.backward()


def test_worked_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4; weights 1 and 2."""
    hidden = torch.ones(2, 1, requires_grad=True)
    matrix = torch.tensor([[1.0], [3.0]]).log()
    loss, losses = weighted_linear_cross_entropy(hidden, matrix, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(losses, torch.tensor([4.0, 4 / 3]).log())
    torch.testing.assert_close(loss, torch.tensor(4.0).log() + 2 * torch.tensor(4 / 3).log())


def test_no_rows_give_zero_and_zero_gradients() -> None:
    hidden, matrix, bias, targets, weights = inputs(torch.float32, rows=0)
    loss, losses = weighted_linear_cross_entropy(hidden, matrix, targets, weights, bias=bias)
    loss.backward()
    assert loss.item() == 0
    assert losses.shape == (0,)
    assert matrix.grad is not None
    assert not matrix.grad.any()


def test_heads_add_up_and_each_finds_the_memory_of_the_one_before_free() -> None:
    hidden, matrix, _, targets, weights = inputs(torch.float64)
    earlier: list[weakref.ref[Tensor]] = []

    def doubled(tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        assert all(states() is None for states in earlier)
        states = 2 * tensors[0]
        earlier.append(weakref.ref(states))
        return [states]

    task = HeadTargets(torch.arange(len(targets)), targets, weights)
    groups = [HeadGroup([head], doubled) for head in range(3)]
    coefficients = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    result = multi_head_cross_entropy([hidden], groups, [task] * 3, matrix, coefficients)
    assert len(earlier) == 3
    expected = 1.75 * (cross_entropy(2 * hidden @ matrix.T, targets, reduction="none") * weights).sum()
    leaves = (hidden, matrix)
    for own, reference in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-12)
