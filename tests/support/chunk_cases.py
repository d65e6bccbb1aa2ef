"""Chunks of logits for both forms of the cross-entropy. As a script, this runs the fused form and saves its results:

    TRITON_INTERPRET=1 python chunk_cases.py results.pt cpu

Triton reads this variable when it is imported, so its interpreter needs a process of its own. On a GPU, without it, the
last argument is `cuda`.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_mtp.training.loss.chunked_loss import ChunkedLoss
from weighted_mtp.training.loss.objectives import CrossEntropy

BLOCK = 4096
"""Logits that a program of the kernel handles at a time."""


class Chunk(NamedTuple):
    """Logits (C, V), targets (C,), weights (C,), bias (V,) or None, and soft-cap."""

    logits: Tensor
    targets: Tensor
    weights: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class Results(NamedTuple):
    """Losses (C,), top-1 (C,) bool and gradient (C, V) of a chunk; losses and logits afterwards without weights."""

    losses: Tensor
    correct: Tensor
    gradient: Tensor
    losses_alone: Tensor
    logits_alone: Tensor


def run(chunk: Chunk, *, fused: bool) -> Results:
    """Both ways to call one of the two forms."""
    vocabulary = chunk.logits.shape[1]
    loss = ChunkedLoss(
        chunk.logits.new_empty(vocabulary, 0),
        chunk.bias,
        torch.float32,
        needs_unembedding_grad=False,
        needs_bias_grad=False,
        softcap=chunk.softcap,
    )
    loss.fused = fused
    logits, alone = chunk.logits.clone(), chunk.logits.clone()
    losses, gradient = loss.losses_of_logits(logits, chunk.targets, chunk.weights, CrossEntropy())
    without, _ = loss.losses_of_logits(alone, chunk.targets, None, CrossEntropy())
    assert gradient is not None
    return Results(losses.token_losses, losses.correct, gradient.to(chunk.logits.dtype), without.token_losses, alone)


def ordinary_chunks() -> dict[str, Chunk]:
    """Random chunks with targets at both ends, one weight 0, and negative weights."""
    chunks = {}
    generator = torch.Generator().manual_seed(0)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    kinds = [*product(dtypes, (1, 7, BLOCK, 9001), (None, 3.0), (False, True)), (torch.bfloat16, 2**18, None, False)]
    for dtype, vocabulary, softcap, with_bias in kinds:
        logits = 4 * torch.randn(5, vocabulary, generator=generator)
        targets = torch.randint(vocabulary, (5,), generator=generator)
        targets[0], targets[1] = 0, vocabulary - 1
        targets[2] = logits[2].to(dtype).argmax()
        weights = torch.tensor([0.7, -1.3, 1.0, 0.0, 2.0])
        bias = torch.randn(vocabulary, generator=generator) if with_bias else None
        name = f"{dtype}-{vocabulary}-softcap={softcap}-bias={with_bias}".removeprefix("torch.")
        chunks[name] = Chunk(logits.to(dtype), targets, weights, bias, softcap)
    return chunks


def extreme_chunks() -> dict[str, Chunk]:
    """Rows with ties, infinities, NaN and large logits, in several blocks."""
    width = 2 * BLOCK + 3
    logits = torch.randn(13, width, generator=torch.Generator().manual_seed(0))
    targets = torch.full((13,), 5)
    logits[0, [5, width - 1]] = 9.0  # the target is one of two largest
    logits[1, :BLOCK] = -torch.inf  # a whole block, the first
    targets[1] = width - 1
    logits[2, BLOCK:] = -torch.inf  # the other blocks
    logits[3, 5] = -torch.inf  # the target: the loss is infinite
    logits[4, 5] = torch.nan  # the target
    logits[5, width - 1] = torch.nan
    logits[6] = -torch.inf
    logits[7, 7] = torch.inf
    logits[8, 5] = torch.inf  # the target
    logits[9, 5] = 300.0  # the probability rounds to 1
    logits[10, 6] = 300.0  # the probability rounds to 0
    logits[11] -= 1000.0  # all of them far below 0
    logits[12] += 1000.0
    chunk = Chunk(logits, targets, torch.linspace(-1, 2, 13))
    masked = torch.where(torch.arange(width) % 3 == 0, -torch.inf, 0.0)
    return {
        "extreme": chunk,
        "extreme-weights-zero": chunk._replace(weights=torch.zeros(13)),
        "extreme-softcap": chunk._replace(softcap=30.0),
        "extreme-bfloat16": chunk._replace(logits=logits.bfloat16()),
        "masked-by-the-bias": chunk._replace(bias=masked),
    }


def outside_chunk() -> Chunk:
    """Targets that are no tokens, which the plain form refuses."""
    return Chunk(torch.randn(3, 7), torch.tensor([-1, 7, 2**32 + 1]), torch.ones(3))


class Whole(NamedTuple):
    """Losses (R,) and the gradients of hidden states, unembedding and bias."""

    losses: Tensor
    grad_hidden: Tensor
    grad_unembedding: Tensor
    grad_bias: Tensor


def whole_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (R, D), unembedding (V, D), bias (V,), targets and weights (R,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, unembedding, bias = (torch.randn(*shape, generator=generator) for shape in ((13, 8), (50, 8), (50,)))
    targets = torch.randint(50, (13,), generator=generator)
    return hidden.requires_grad_(), unembedding, bias, targets, torch.rand(13, generator=generator) - 0.3


def run_whole(matmul_dtype: torch.dtype, *, fused: bool, device: str = "cpu") -> Whole:
    """The loss of several chunks, with the products in a dtype that a CPU otherwise does not use."""
    hidden, unembedding, bias, targets, weights = (value.to(device) for value in whole_problem())
    loss = ChunkedLoss(
        unembedding,
        bias,
        torch.float32,
        needs_unembedding_grad=True,
        needs_bias_grad=True,
        softcap=5.0,
        chunk_rows=5,
    )
    loss.fused, loss.matmul_dtype, loss.unembedding = fused, matmul_dtype, unembedding.to(matmul_dtype)
    losses, grad_hidden = loss.losses_and_gradients(hidden, targets, weights)
    assert grad_hidden is not None
    assert loss.grad_unembedding is not None
    assert loss.grad_bias is not None
    return Whole(losses.objective_losses, grad_hidden, loss.grad_unembedding, loss.grad_bias)


def fused_results(device: str, path: Path) -> dict[str, tuple[Tensor, ...]]:
    """The results of the fused form on the CPU, of all cases by name; computed in another process and saved to `path`.

    Args:
        device: `cuda`, or `cpu` for Triton's interpreter.
        path: file to write.
    """
    interpreter = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [sys.executable, __file__, str(path), device]
    done = subprocess.run(command, env=os.environ | interpreter, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def main(path: str, device: str) -> None:
    """Run the fused form on all cases and save the results."""
    chunks = {**ordinary_chunks(), **extreme_chunks(), "outside": outside_chunk()}
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, chunk in chunks.items():
        there = Chunk(*(value.to(device) if isinstance(value, Tensor) else value for value in chunk))
        results[name] = tuple(value.cpu() for value in run(there, fused=True))
    for matmul_dtype in torch.float32, torch.bfloat16:
        whole = run_whole(matmul_dtype, fused=True, device=device)
        results[f"whole-{matmul_dtype}"] = tuple(value.cpu() for value in whole)
    torch.save(results, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
