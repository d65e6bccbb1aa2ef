"""The loss on a GPU, its value and its gradients, against float64 and against the kernels of other packages."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The weighted sum of losses of hidden states (R, D), unembedding (V, D), targets (R,) and weights (R,)."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error of a gradient, relative to its norm. TF32 is off by default."""

pytestmark = pytest.mark.gpu


def ours(hidden: Tensor, unembedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return weighted_linear_cross_entropy(hidden, unembedding, targets, weights)[0]


def plain(hidden: Tensor, unembedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, unembedding).float(), targets, reduction="none") @ weights


def liger(hidden: Tensor, unembedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Liger takes no token weights: rows of weight 0 are ignored, and all others have the same."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    labels = targets.masked_fill(weights == 0, -100)
    settings = {"reduction": "sum", "accum_dtype": torch.float32}
    return liger_fused_linear_cross_entropy(hidden, unembedding, labels, **settings) * weights.max()


def cut_cross_entropy(hidden: Tensor, unembedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Without its filter for small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, unembedding, targets, reduction="none", filter_eps=None).float() @ weights


OTHERS: dict[str, Loss] = {"liger_kernel": liger, "cut_cross_entropy": cut_cross_entropy}


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def problem(dtype: torch.dtype, device: torch.device, rehearsed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen2.5-0.5B's hidden size and vocabulary, two chunks of rows and a rest; a quarter of the weights are 0."""
    rows, hidden, vocabulary = (530, 32, 1000) if rehearsed else (4200, 896, 151936)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator)
    unembedding = 2 * hidden**-0.5 * torch.randn(vocabulary, hidden, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) + 0.5
    weights[::4] = 0
    matrices = [matrix.to(device, dtype).requires_grad_() for matrix in (states, unembedding)]
    return *matrices, targets.to(device), weights.to(device)


def value_and_gradients(loss: Loss, problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Value, gradient of the hidden states, gradient of the unembedding; in float64."""
    hidden, unembedding, *_ = problem
    value = loss(*problem)
    return [tensor.detach().double() for tensor in (value, *torch.autograd.grad(value, (hidden, unembedding)))]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Norm of the difference over the norm, for each tensor."""
    return [float((own - other).norm() / other.norm()) for own, other in zip(found, expected, strict=True)]


def exact(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """In float64, in parts: the logits of all rows would take 5 GB."""
    hidden, unembedding, targets, weights = problem
    states, matrix = (tensor.detach().double().requires_grad_() for tensor in (hidden, unembedding))
    value = torch.zeros((), dtype=torch.float64, device=states.device)
    for rows in torch.arange(len(targets), device=states.device).split(512):
        losses = F.cross_entropy(F.linear(states[rows], matrix), targets[rows], reduction="none")
        part = losses @ weights[rows].double()
        part.backward()
        value += part.detach()
    return [value, states.grad, matrix.grad]


def test_ours_is_as_exact_as_all_logits_at_once(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, record_property: Any
) -> None:
    expected = exact(problem)
    own, naive = (errors(value_and_gradients(loss, problem), expected) for loss in (ours, plain))
    for name, mine, theirs in zip(("value", "states", "unembedding"), own, naive, strict=True):
        record_property(f"error_of_{name}", mine)
        record_property(f"error_of_{name}_with_all_logits", theirs)
    assert max(own) < TOLERANCES[dtype]
    assert own[0] <= 2 * naive[0] + 1e-6, "the value is a sum of float32 losses"


@pytest.mark.parametrize("package", OTHERS)
def test_ours_equals_the_kernels_of_others(
    package: str, problem: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Weights 0 and 1, which Liger can express."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if device.type == "cpu":
        pytest.skip(f"{package} needs a GPU")
    if package == "cut_cross_entropy" and dtype == torch.float32:
        pytest.skip("cut_cross_entropy takes no float32")
    *rest, weights = problem
    selected = (*rest, (weights > 0).float())
    found = errors(value_and_gradients(ours, selected), value_and_gradients(OTHERS[package], selected))
    assert max(found) < 2 * TOLERANCES[dtype]


def test_four_heads_cost_the_memory_of_one_chunk(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype, device: torch.device, record_property: Any
) -> None:
    """Four heads on the same states have four times the loss of one, and hold the logits of one chunk at a time."""
    hidden, unembedding, targets, weights = problem
    rows = torch.arange(len(targets), device=device)
    peaks, values = [], []
    for heads in (1, 4):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        groups = [HeadGroup([head], lambda inputs, rows: [inputs[0][rows[0]]]) for head in range(heads)]
        task = [HeadTargets(rows, targets, weights)] * heads
        ones = torch.ones(heads, device=device)
        total = multi_head_cross_entropy([hidden], groups, task, unembedding, ones).total
        values.append(total.item() / heads)
        torch.autograd.grad(total, (hidden, unembedding))
        peaks.append(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    if device.type == "cuda":
        record_property("peak_bytes_of_one_and_four_heads", peaks)
        assert peaks[1] < peaks[0] + 4 * hidden.nbytes + (64 << 20)
