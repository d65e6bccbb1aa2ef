"""Losses and gradients one chunk of logits at a time: memory, dtypes, and rows without gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from weighted_mtp.training.loss import chunked_loss
from weighted_mtp.training.loss.chunked_loss import ChunkedLoss, add_product
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


class PeakMemory(TorchDispatchMode):
    """The peak of the bytes in tensors that operations create."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {value.untyped_storage()._cdata for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        output = func(*args, **kwargs)
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in given:
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self.sizes.values()))
        return output


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_holds_no_product_of_the_size_of_the_unembedding(
    matmul_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 x 200 products; a chunk of logits has 8 x 300. The bfloat16 products are those of a device without CUDA."""
    monkeypatch.setattr(chunked_loss, "PRODUCT_BYTES", 2**14)
    unembedding, hidden = torch.randn(300, 200), torch.randn(24, 200, requires_grad=True)
    loss = ChunkedLoss(
        unembedding, None, torch.float32, needs_unembedding_grad=True, needs_bias_grad=False, chunk_rows=8
    )
    loss.matmul_dtype, loss.unembedding = matmul_dtype, unembedding.to(matmul_dtype)
    with PeakMemory() as peak:
        loss.losses_and_gradients(hidden, torch.arange(24), torch.ones(24))
    assert 8 * 300 * 4 <= peak.bytes < 300 * 200 * 2


@pytest.mark.parametrize(
    ("dtype", "total_dtype"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_adds_products_in_blocks_of_bounded_size(
    dtype: torch.dtype, total_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 rows of 12 columns, in blocks of at most 5 rows where the dtypes differ."""
    monkeypatch.setattr(chunked_loss, "PRODUCT_BYTES", 5 * 12 * 4)
    generator = torch.Generator().manual_seed(0)
    total, left, right = (torch.randn(*shape, generator=generator) for shape in ((17, 12), (17, 6), (6, 12)))
    total, left, right = total.to(total_dtype), left.to(dtype), right.to(dtype)
    expected = total.double() + left.double() @ right.double()
    with PeakMemory() as peak:
        add_product(total, left, right)
    error = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(total.double(), expected, rtol=error, atol=error)
    assert peak.bytes <= 5 * 12 * 4


@pytest.mark.parametrize(
    ("device", "dtype", "has_triton", "fused"),
    [
        ("cuda", torch.float32, True, True),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float64, True, False),
        ("cuda", torch.bfloat16, False, False),
        ("cpu", torch.float32, True, False),
    ],
)
def test_fused_on_cuda_with_triton_except_in_float64(
    device: str, dtype: torch.dtype, has_triton: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "find_spec", lambda name: (name == "triton" and has_triton) or None)
    with FakeTensorMode():
        matrix = torch.empty(5, 3, device=device, dtype=dtype)
        loss = ChunkedLoss(matrix, None, dtype, needs_unembedding_grad=True, needs_bias_grad=False)
    assert loss.fused == fused


def test_other_objectives_are_never_fused() -> None:
    """The kernel would raise an error for tensors of a CPU."""
    hidden, matrix, _, targets, weights = inputs(torch.float32)
    losses = []
    for fused in (False, True):
        loss = ChunkedLoss(
            matrix,
            None,
            torch.float32,
            needs_unembedding_grad=True,
            needs_bias_grad=False,
            objective=DiversityOrPrecision(beta=0.5),
        )
        loss.fused = fused
        losses.append(loss.losses_and_gradients(hidden, targets, weights)[0].objective_losses)
    assert torch.equal(*losses)


class Recorded(TorchDispatchMode):
    """The operations, which do nothing but return `out`: PyTorch for CPUs lacks some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a question about the device or the layout
            return func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs))
        return kwargs["out"]


def test_on_cuda_one_operation_adds_bfloat16_products_to_float32() -> None:
    """These tensors have shapes, dtypes and a device, but no values."""
    with FakeTensorMode():
        total = torch.empty(17, 12, device="cuda")
        left, right = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((17, 6), (6, 12)))
        with Recorded() as recorded:
            add_product(total, left, right)
    [(operation, arguments, keywords)] = recorded.calls
    assert operation is torch.ops.aten.addmm.dtype_out
    assert arguments[0] is keywords["out"] is total
    assert (arguments[1:3], arguments[3]) == ((left, right), torch.float32)


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
