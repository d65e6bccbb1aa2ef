"""Losses of hidden states against an unembedding, one chunk of logits at a time.

The gradient of each chunk of logits is computed right after its losses. This takes three matrix products and four
passes over the chunk. Recomputing the logits in the backward pass would take four matrix products. On CUDA, one kernel
makes these passes for the cross-entropy (see `training.loss.fused_cross_entropy`).
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_mtp.training.loss.objectives import CrossEntropy, Objective

PRODUCT_BYTES = 2**26
"""Bound of the temporary memory of `add_product`."""

CHUNK_ROWS = 1024
FLOAT32_PRODUCTS = {"cpu"}
"""Types of devices on which matrix products are at least float32. Many CPUs are many times slower in bfloat16."""


class RowLosses(NamedTuple):
    """Losses of R rows, without gradients.

    Attributes:
        objective_losses: (R,) values of the objective to minimise, nats.
        token_losses: (R,) the losses to log and to rank, nats; negative log-likelihoods where targets are tokens.
        correct: (R,) bool, whether the target is the most likely token.
    """

    objective_losses: Tensor
    token_losses: Tensor
    correct: Tensor


class ChunkedLoss:
    """Losses against one unembedding. Accumulates its gradients over all heads of a batch.

    Attributes:
        grad_unembedding: (V, D) in `loss_dtype`, or None.
        grad_bias: (V,) in `loss_dtype`, or None.
        loss_dtype: dtype of logits in the softmax, losses and accumulated gradients: float32, or float64 for float64
            hidden states.
        matmul_dtype: dtype of matrix products: on a CPU `loss_dtype`, else the dtype of autocast or hidden states.
        fused: whether one Triton kernel computes the cross-entropy: on CUDA with Triton, except in float64.
    """

    def __init__(
        self,
        unembedding: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        needs_unembedding_grad: bool,
        needs_bias_grad: bool,
        softcap: float | None = None,
        chunk_rows: int = CHUNK_ROWS,
        objective: Objective | None = None,
    ) -> None:
        """Allocate the required gradients.

        Args:
            unembedding: (V, D).
            bias: (V,) or None.
            dtype: dtype of the hidden states.
            needs_unembedding_grad: whether to compute `grad_unembedding`.
            needs_bias_grad: whether to compute `grad_bias`.
            softcap: bound of the logits, or None.
            chunk_rows: rows of logits in memory at once.
            objective: the loss of a row; the negative log-likelihood by default.
        """
        self.objective = objective or CrossEntropy()
        self.device = unembedding.device.type
        self.loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else dtype
        self.matmul_dtype = self.loss_dtype if self.device in FLOAT32_PRODUCTS else autocast
        self.unembedding = unembedding.detach().to(self.matmul_dtype)
        self.bias = bias
        self.softcap = softcap
        self.chunk_rows = chunk_rows
        self.fused = self.device == "cuda" and self.loss_dtype == torch.float32 and find_spec("triton") is not None
        self.grad_unembedding: Tensor | None = None
        if needs_unembedding_grad:
            self.grad_unembedding = torch.zeros_like(unembedding, dtype=self.loss_dtype)
        self.grad_bias: Tensor | None = None
        if bias is not None and needs_bias_grad:
            self.grad_bias = torch.zeros_like(bias, dtype=self.loss_dtype)

    def token_losses(self, hidden_states: Tensor, targets: Tensor) -> RowLosses:
        """Negative log-likelihoods of targets (R,) for hidden states (R, D), regardless of the objective."""
        return self._run(hidden_states, targets, CrossEntropy(), None, None)

    def losses_and_gradients(
        self, hidden_states: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[RowLosses, Tensor | None]:
        """Losses, and the gradient (R, D) of the sum of objective losses times `weights`; None if it is not needed.

        Gradients of unembedding and bias are added to the attributes.
        """
        grad_hidden = torch.empty_like(hidden_states) if hidden_states.requires_grad else None
        if grad_hidden is None and self.grad_unembedding is None and self.grad_bias is None:
            return self._run(hidden_states, targets, self.objective, None, None), None
        losses = self._run(hidden_states, targets, self.objective, weights.to(self.loss_dtype), grad_hidden)
        return losses, grad_hidden

    def _run(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        objective: Objective,
        weights: Tensor | None,
        grad_hidden: Tensor | None,
    ) -> RowLosses:
        """Losses of all rows, with gradients unless `weights` is None; fills `grad_hidden` in place."""
        objective_losses, token_losses = torch.empty(2, len(targets), dtype=self.loss_dtype, device=targets.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            # One buffer for all chunks: otherwise each chunk is allocated while the previous one is still in memory.
            buffer = self.unembedding.new_empty(min(len(targets), self.chunk_rows), len(self.unembedding))
            for start in range(0, len(targets), self.chunk_rows):
                rows = slice(start, start + self.chunk_rows)
                states = hidden_states[rows].to(self.matmul_dtype)  # (C, D)
                logits = torch.mm(states, self.unembedding.T, out=buffer[: len(states)])  # (C, V)
                row_weights = None if weights is None else weights[rows]
                losses, grad_logits = self.losses_of_logits(logits, targets[rows], row_weights, objective)
                objective_losses[rows], token_losses[rows], correct[rows] = losses
                if grad_logits is None:
                    continue
                grad_states = self._add_gradients(grad_logits, states, needs_states=grad_hidden is not None)
                if grad_hidden is not None and grad_states is not None:
                    grad_hidden[rows] = grad_states
        return RowLosses(objective_losses, token_losses, correct)

    def losses_of_logits(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None, objective: Objective
    ) -> tuple[RowLosses, Tensor | None]:
        """Losses of a chunk of logits, and the gradient (C, V) of their sum times `weights`, None without weights.

        Args:
            logits: (C, V) in `matmul_dtype`, before bias and soft-cap; overwritten.
            targets: (C,) targets of the objective.
            weights: (C,) in `loss_dtype`, or None.
            objective: the loss of a row.
        """
        if self.fused and type(objective) is CrossEntropy:
            from weighted_mtp.training.loss.fused_cross_entropy import fused_cross_entropy

            losses, correct = fused_cross_entropy(logits, targets, weights, self.bias, self.softcap)
            return RowLosses(losses, losses, correct), None if weights is None else logits
        logits = logits.to(self.loss_dtype)
        if self.bias is not None:
            logits += self.bias
        softcap_slope = None
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            softcap_slope = 1 - logits.square() if weights is not None else None
            logits.mul_(self.softcap)
        chunk = objective(logits, targets)
        grad_logits = None if weights is None else chunk.gradient(weights)  # in the memory of the logits
        if grad_logits is not None and softcap_slope is not None:
            grad_logits *= softcap_slope
        return RowLosses(*chunk[:3]), grad_logits

    def _add_gradients(self, grad_logits: Tensor, states: Tensor, *, needs_states: bool) -> Tensor | None:
        """Add a chunk's gradients of unembedding and bias; return that of its hidden states (C, D), if needed."""
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.loss_dtype)
        grad_logits = grad_logits.to(self.matmul_dtype)
        grad_states = grad_logits @ self.unembedding if needs_states else None
        if self.grad_unembedding is not None:
            add_product(self.grad_unembedding, grad_logits.T, states)
        return grad_states


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the matrix product of left (M, K) and right (K, N) to total (M, N), without a temporary of its size.

    CUDA adds products of bfloat16 and float16 to float32 without rounding them. Other devices cannot, and form them in
    blocks of rows.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, PRODUCT_BYTES // total[0].nbytes)
        for block, factors in zip(total.split(rows), left.split(rows), strict=True):
            block += factors @ right
