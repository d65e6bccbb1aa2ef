"""The cross-entropy of a chunk of logits and its gradient in one Triton kernel, for GPUs.

The formulas are those of `objectives.CrossEntropy` and of the soft-cap in `chunked_loss`. In bfloat16, these read or
write a chunk twelve times, mostly in float32. The kernel reads it twice, writes the gradient once, and makes no copy.

PyTorch for GPUs includes Triton, which compiles the kernel at its first use and needs a C compiler for this.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program handles at a time. Neither this number nor the next was tuned on a GPU."""

WARPS = 8


def fused_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, in float32; overwrites the logits with their gradient unless `weights` is None.

    Args:
        logits: (C, V) float32, bfloat16 or float16, contiguous, before bias and soft-cap.
        targets: (C,) int64. A target outside 0..V-1 gives a NaN loss.
        weights: (C,) float32, factors of the rows' losses, or None for no gradient.
        bias: (V,) floating, or None.
        softcap: bound of the logits, or None.

    Returns:
        Negative log-likelihoods (C,) float32, and whether no other logit is larger than the target's (C,) bool, False
        where the loss is NaN. A NaN in a row makes its loss and gradient NaN.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        cross_entropy_kernel[(rows,)](
            logits,
            targets.contiguous(),
            None if weights is None else weights.contiguous(),
            None if bias is None else bias.contiguous(),
            losses,
            correct,
            softcap,
            vocabulary,
            BLOCK,
            num_warps=WARPS,
        )
    return losses, correct


@triton.jit
def cross_entropy_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    losses: tl.tensor,
    correct: tl.tensor,
    softcap: tl.tensor,
    vocabulary: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One row: loss and top-1 with a running softmax, then the gradient in place of the logits."""
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * vocabulary
    target = tl.load(targets + row)
    is_token = (target >= 0) & (target < vocabulary)
    target_logit = _load_logits(row_logits, bias, target, is_token, softcap)
    target_logit = tl.where(is_token, target_logit, float("nan"))

    maximum = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, block):
        columns = start + tl.arange(0, block)
        inside = columns < vocabulary
        values = _load_logits(row_logits, bias, columns, inside, softcap)
        values = tl.where(inside, values, float("-inf"))
        previous = maximum
        maximum = tl.maximum(maximum, tl.max(values, 0))
        # Without a logit above -inf so far, subtracting the maximum would give NaN.
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        total = total * tl.exp(previous - shift) + tl.sum(tl.exp(values - shift), 0)
    loss = tl.log(total) + (maximum - target_logit)
    tl.store(losses + row, loss)
    tl.store(correct + row, (target_logit >= maximum) & (loss == loss))

    if weights is not None:
        weight = tl.load(weights + row)
        scale = weight / total
        for start in range(0, vocabulary, block):
            columns = start + tl.arange(0, block)
            inside = columns < vocabulary
            values = _load_logits(row_logits, bias, columns, inside, softcap)
            gradient = tl.exp(values - maximum) * scale - tl.where(columns == target, weight, 0.0)
            if softcap is not None:
                gradient *= 1 - (values / softcap) * (values / softcap)
            tl.store(row_logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _load_logits(
    row_logits: tl.tensor, bias: tl.tensor, columns: tl.tensor, inside: tl.tensor, softcap: tl.tensor
) -> tl.tensor:
    """Logits in float32 with bias and soft-cap."""
    values = tl.load(row_logits + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        values = softcap * (2 * tl.sigmoid(2 * values / softcap) - 1)  # Triton lacks tanh
    return values
