"""Losses of hidden states against an unembedding, a chunk of logits at a time.

The gradient of a chunk of logits is formed while the chunk is at hand: three matrix products instead of the four that
recomputing the logits in the backward pass would take, and four passes over the chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from weighted_mtp.training.loss.objectives import CrossEntropy, Objective

CHUNK_ROWS = 1024


class RowLosses(NamedTuple):
    """What rows lose, without gradients.

    Attributes:
        values: (R,) what the objective minimises, nats.
        losses: (R,) what is logged and ranked, nats: the negative log-likelihood if targets are tokens.
        correct: (R,) bool, whether the target is the most likely token.
    """

    values: Tensor
    losses: Tensor
    correct: Tensor


class OutputLayer:
    """The unembedding while the losses of one batch are computed: gradients of all heads add up here."""

    def __init__(
        self,
        unembedding: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        needs_matrix: bool,
        needs_bias: bool,
        softcap: float | None = None,
        chunk_rows: int = CHUNK_ROWS,
        objective: Objective | None = None,
    ) -> None:
        """Prepare for hidden states of type `dtype`, and to add up the gradients that are needed.

        Args:
            unembedding: (V, D).
            bias: (V,) or None.
            dtype: floating type of the hidden states that will come.
            needs_matrix: whether `grad_matrix` (V, D) is wanted.
            needs_bias: whether `grad_bias` (V,) is.
            softcap: bound of the logits, or None.
            chunk_rows: rows whose logits are held at once.
            objective: what is minimised; the negative log-likelihood by default.
        """
        self.objective = objective or CrossEntropy()
        self.device = unembedding.device.type
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else dtype
        self.narrow = self.wide if self.device == "cpu" else autocast
        self.matrix = unembedding.detach().to(self.narrow)
        self.bias = bias
        self.softcap = softcap
        self.chunk_rows = chunk_rows
        self.grad_matrix = torch.zeros_like(unembedding, dtype=self.wide) if needs_matrix else None
        self.grad_bias = torch.zeros_like(bias, dtype=self.wide) if bias is not None and needs_bias else None

    def losses(self, hidden_states: Tensor, targets: Tensor) -> RowLosses:
        """Negative log-likelihoods of targets (R,) for hidden states (R, D), whatever the objective."""
        return self._run(hidden_states, targets, CrossEntropy(), None, None)

    def losses_and_gradients(
        self, hidden_states: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[RowLosses, Tensor | None]:
        """Losses and the gradient (R, D) of the weighted sum of their values, None where it is not needed."""
        grad_hidden = torch.empty_like(hidden_states) if hidden_states.requires_grad else None
        if grad_hidden is None and self.grad_matrix is None and self.grad_bias is None:
            return self._run(hidden_states, targets, self.objective, None, None), None
        losses = self._run(hidden_states, targets, self.objective, weights.to(self.wide), grad_hidden)
        return losses, grad_hidden

    def _run(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        objective: Objective,
        weights: Tensor | None,
        grad_hidden: Tensor | None,
    ) -> RowLosses:
        values, losses = torch.empty(2, len(targets), dtype=self.wide, device=targets.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            buffer = self._buffer(len(targets))
            for start in range(0, len(targets), self.chunk_rows):
                rows = slice(start, start + self.chunk_rows)
                states = hidden_states[rows].to(self.narrow)
                logits = torch.mm(states, self.matrix.T, out=buffer[: len(states)]).to(self.wide)
                if self.bias is not None:
                    logits += self.bias
                slope = None
                if self.softcap is not None:
                    logits.div_(self.softcap).tanh_()
                    slope = 1 - logits.square() if weights is not None else None
                    logits.mul_(self.softcap)
                chunk = objective(logits, targets[rows])
                values[rows], losses[rows], correct[rows] = chunk[:3]
                if weights is None:
                    continue
                grad_logits = chunk.gradient(weights[rows])
                if slope is not None:
                    grad_logits *= slope
                if self.grad_bias is not None:
                    self.grad_bias += grad_logits.sum(0)
                narrow = grad_logits.to(self.narrow)
                if grad_hidden is not None:
                    grad_hidden[rows] = narrow @ self.matrix
                if self.grad_matrix is not None:
                    if self.narrow == self.wide:
                        self.grad_matrix.addmm_(narrow.T, states)
                    else:
                        self.grad_matrix += narrow.T @ states
        return RowLosses(values, losses, correct)

    def _buffer(self, rows: int) -> Tensor:
        """Room for a chunk of logits, shared by all chunks: each would else be made while the one before is held."""
        return self.matrix.new_empty(min(rows, self.chunk_rows), len(self.matrix))
