"""Losses and gradients one chunk of logits at a time: memory, dtypes, and rows without gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from weighted_mtp.training.loss.multi_head import (
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.loss.objectives import DiversityOrPrecision, Objective
from weighted_mtp.training.loss.token_order import TokenOrder


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return output


@pytest.mark.parametrize(
    "objective",
    [
        DiversityOrPrecision(-0.25, lambda_tail=-0.1, top_k=7),
        TokenOrder(torch.arange(65)[None] % 50, torch.arange(65)[None], None),
    ],
)
def test_never_holds_more_than_a_chunk_of_logits(objective: Objective) -> None:
    """64 rows and 50 tokens, a chunk is 8 rows; hidden states and unembedding are smaller."""
    hidden, matrix = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    targets = 1 + torch.arange(64) % 49
    with LargestTensor() as largest:
        value, _ = weighted_linear_cross_entropy(
            hidden, matrix, targets, torch.ones(64), chunk_rows=8, objective=objective
        )
        value.backward()
    assert 8 * 50 <= largest.elements <= 8 * 65


def inputs(dtype: torch.dtype, rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, matrix, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((rows, 8), (11, 8), (11,))
    )
    targets = torch.randint(0, 11, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) - 0.3  # rewards and advantages may be negative
    return hidden, matrix, bias, targets, weights.to(dtype)


def test_losses_beyond_what_float32_can_hold_as_a_probability() -> None:
    """exp(-200) is 0 in float32; the loss and its gradient are exact all the same."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    loss, losses = weighted_linear_cross_entropy(
        hidden, torch.tensor([[200.0], [0.0]]), torch.tensor([1]), torch.ones(1)
    )
    loss.backward()
    assert losses.tolist() == [200.0]
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[200.0]]


def test_bfloat16_is_within_its_rounding() -> None:
    hidden, matrix, _, targets, weights = inputs(torch.bfloat16)
    loss, losses = weighted_linear_cross_entropy(hidden, matrix, targets, weights)
    exact = cross_entropy(hidden.float() @ matrix.float().T, targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0, atol=0.05)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_autocast_keeps_float32_parameters_and_gradients() -> None:
    hidden, matrix, _, targets, weights = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_linear_cross_entropy(hidden, matrix, targets, weights)
    loss.backward()
    exact = (cross_entropy(hidden @ matrix.T, targets, reduction="none") * weights).sum()
    grad = torch.autograd.grad(exact, matrix)[0]
    assert matrix.grad is not None
    assert matrix.grad.dtype == torch.float32
    torch.testing.assert_close(matrix.grad, grad, rtol=0.05, atol=0.05)


def test_no_gradients_are_formed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation must not pay for them: only they need the targets subtracted."""
    hidden, matrix, _, targets, weights = inputs(torch.float32)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *_: pytest.fail("formed gradients"))
    with torch.no_grad():
        weighted_linear_cross_entropy(hidden, matrix, targets, weights)
    with pytest.raises(pytest.fail.Exception):
        weighted_linear_cross_entropy(hidden, matrix, targets, weights)
