"""Weighted cross-entropy against one shared unembedding, without ever holding the logits of all rows.

The weights of the rows are known before the forward pass. So the rows of weight 0 are dropped before this is called,
and the gradient of every chunk of logits is formed while the chunk is at hand: three matrix products instead of the
four that recomputing the logits in the backward pass would take. Beyond one chunk of logits this holds the gradients
until the backward pass: one matrix like the unembedding, however many heads share it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 1024


def weighted_linear_cross_entropy(
    hidden_states: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Sum over rows r of `weights[r] * -log softmax(z[r])[targets[r]]`, z = hidden_states @ unembedding.T + bias.

    With `softcap` c the logits are `c * tanh(z / c)` (Gemma 2, arXiv 2408.00118, section 2). Matrix products run in
    the autocast dtype where autocast is on, otherwise in the dtype of `hidden_states`; softmax and losses in float32
    (float64 for float64 input).

    Args:
        hidden_states: (R, D) rows, any floating dtype.
        unembedding: (V, D).
        targets: (R,) int64, all of them valid token ids.
        weights: (R,) non-negative.
        bias: (V,) or None.
        softcap: bound of the logits, or None.
        chunk_rows: rows whose logits are held at once.

    Returns:
        The weighted sum, a scalar with gradients for `hidden_states`, `unembedding` and `bias`, and the (R,) losses
        in nats without gradients.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    with torch.autocast(device, enabled=False):
        return _WeightedLinearCrossEntropy.apply(
            hidden_states.to(dtype), unembedding, targets, weights, bias, softcap, chunk_rows, torch.is_grad_enabled()
        )


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        unembedding: Tensor,
        targets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        chunk_rows: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        matrix = unembedding.to(hidden_states.dtype)
        weights = weights.to(wide)
        losses = torch.empty(len(targets), dtype=wide, device=hidden_states.device)
        # Under no_grad autograd still says that parameters need gradients.
        needs_hidden, needs_unembedding, needs_bias = (grad_enabled and ctx.needs_input_grad[i] for i in (0, 1, 4))
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_unembedding = torch.zeros_like(unembedding, dtype=wide) if needs_unembedding else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None

        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden_states[rows] @ matrix.T).to(wide)
            if bias is not None:
                logits += bias
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            target = targets[rows, None]
            log_normalizer = torch.logsumexp(logits, -1, keepdim=True)
            losses[rows] = (log_normalizer - logits.gather(-1, target)).squeeze(-1)
            if not (needs_hidden or needs_unembedding or needs_bias):
                continue
            slope = None if softcap is None else 1 - (logits / softcap).square()
            grad_logits = logits.sub_(log_normalizer).exp_()
            grad_logits.scatter_add_(-1, target, -torch.ones_like(target, dtype=wide))
            grad_logits *= weights[rows, None]
            if slope is not None:
                grad_logits *= slope
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            narrow = grad_logits.to(hidden_states.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = narrow @ matrix
            if grad_unembedding is not None:
                if narrow.dtype == wide:
                    grad_unembedding.addmm_(narrow.T, hidden_states[rows])
                else:
                    grad_unembedding += narrow.T @ hidden_states[rows]

        ctx.save_for_backward(grad_hidden, grad_unembedding, grad_bias)
        ctx.dtypes = unembedding.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_unembedding, grad_bias = ctx.saved_tensors
        unembedding_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden * grad_sum).to(grad_hidden.dtype),
            None if grad_unembedding is None else (grad_unembedding * grad_sum).to(unembedding_dtype),
            None,
            None,
            None if grad_bias is None else (grad_bias * grad_sum).to(bias_dtype),
            None,
            None,
            None,
        )
