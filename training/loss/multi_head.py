"""Weighted losses of all heads against one shared unembedding, without the logits of all rows in memory.

Weights are known in advance, so the forward pass skips rows of weight 0 and computes gradients, one chunk of logits at
a time (see `training.loss.chunked_loss`). Heads run and are differentiated one after another (arXiv 2404.19737, section
2). Until the backward pass, memory holds one gradient per input and parameter, one chunk of logits and the activations
of one head, regardless of the number of heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weighted_mtp.training.loss.chunked_loss import CHUNK_ROWS, ChunkedLoss, RowLosses
from weighted_mtp.training.loss.objectives import Objective


class HeadTargets(NamedTuple):
    """The rows predicted by one head, with targets and weights.

    Attributes:
        rows: (R,) int64, indices into the flattened positions of a batch.
        targets: (R,) int64, valid token ids, or other targets of the objective.
        weights: (R,) floating, or (R, components) for live weights.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class HeadGroup:
    """Heads whose hidden states are computed together: one parallel head, or a chain of sequential modules.

    Attributes:
        heads: numbers of the heads, ascending.
        hidden_states: maps the inputs and the rows (R,) of each head to the hidden states (R, D) of each head.
        parameters: parameters of the group.
    """

    heads: Sequence[int]
    hidden_states: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    parameters: Sequence[Tensor] = ()


class HeadLosses(NamedTuple):
    """Losses of all heads, concatenated in the order of the heads.

    Attributes:
        total: scalar with gradients, the sum over heads k and rows r of
            `coefficients[k] * weights[r] * objective_losses[r]`.
        objective_losses: (sum of R,) float32 (float64 for float64 input), values of the objective to minimise,
            without gradients; 0 for rows whose live weight is 0.
        token_losses: (sum of R,) of the same dtype, the losses to log and to rank, nats.
        correct: (sum of R,) bool, whether the target is the most likely token.
        weights: (sum of R,) the weights used.
    """

    total: Tensor
    objective_losses: Tensor
    token_losses: Tensor
    correct: Tensor
    weights: Tensor


LiveWeightFunction = Callable[[Tensor, HeadTargets], Tensor]
"""Maps a head's current losses (R,) and its targets, whose weights are components, to weights (R,)."""


def weighted_linear_cross_entropy(
    hidden_states: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
    objective: Objective | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows r of `weights[r] * -log softmax(z[r])[targets[r]]`, z = hidden_states @ unembedding.T + bias.

    Args:
        hidden_states: (R, D) rows, any floating dtype.
        unembedding: (V, D).
        targets: (R,) int64, valid token ids.
        weights: (R,).
        bias: (V,) or None.
        softcap: bound of the logits, or None.
        chunk_rows: rows of logits in memory at once.
        objective: the loss to sum; the negative log-likelihood by default.

    Returns:
        The weighted sum, a scalar with gradients for `hidden_states`, `unembedding` and `bias`, and the (R,) losses
        in nats without gradients. This is the simplest case of `multi_head_cross_entropy`.
    """
    everything = HeadTargets(torch.arange(len(targets), device=targets.device), targets, weights)
    result = multi_head_cross_entropy(
        [hidden_states],
        [HeadGroup([0], lambda inputs, rows: [inputs[0]])],
        [everything],
        unembedding,
        torch.ones(1, device=targets.device),
        bias=bias,
        softcap=softcap,
        chunk_rows=chunk_rows,
        objective=objective,
    )
    return result.total, result.token_losses


def multi_head_cross_entropy(
    inputs: Sequence[Tensor],
    groups: Sequence[HeadGroup],
    targets: Sequence[HeadTargets],
    unembedding: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
    live: LiveWeightFunction | None = None,
    objective: Objective | None = None,
) -> HeadLosses:
    """Weighted loss of several heads, cross-entropy by default.

    With `softcap` c the logits are `c * tanh(z / c)` (Gemma 2, arXiv 2408.00118, section 2). Softmax and losses are
    computed in float32 (float64 for float64 input). Matrix products use the autocast dtype where autocast is on, else
    the dtype of the hidden states; on a CPU at least float32, because many CPUs are many times slower in bfloat16.

    Args:
        inputs: tensors shared by the groups, such as the trunk's hidden states; they may need gradients.
        groups: each head belongs to exactly one group.
        targets: rows, targets and weights of each head.
        unembedding: (V, D), shared by all heads.
        coefficients: (K,) factor of each head's losses.
        bias: (V,) or None.
        softcap: bound of the logits, or None.
        chunk_rows: rows of logits in memory at once.
        live: computes the weights from the negative log-likelihoods. All rows are then predicted once without
            gradients, and rows of nonzero weight a second time.
        objective: the loss of a row; the negative log-likelihood by default.

    Returns:
        The losses. Gradients are computed here, so `total` can be differentiated only once.
    """
    settings = _LossSettings(
        groups, targets, coefficients, softcap, chunk_rows, live, objective, torch.is_grad_enabled()
    )
    parameters = [parameter for group in groups for parameter in group.parameters]
    return HeadLosses(*_MultiHeadCrossEntropy.apply(settings, len(inputs), unembedding, bias, *inputs, *parameters))


@dataclass(frozen=True)
class _LossSettings:
    """The arguments of `multi_head_cross_entropy` that need no gradient."""

    groups: Sequence[HeadGroup]
    targets: Sequence[HeadTargets]
    coefficients: Tensor
    softcap: float | None
    chunk_rows: int
    live: LiveWeightFunction | None
    objective: Objective | None
    grad_enabled: bool


class _MultiHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _LossSettings, n_inputs: int, unembedding: Tensor, bias: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        # Under no_grad autograd still reports that parameters need gradients.
        needs_unembedding, needs_bias, *needed = [settings.grad_enabled and n for n in ctx.needs_input_grad[2:]]
        inputs = [tensor.detach().requires_grad_(n) for tensor, n in zip(tensors[:n_inputs], needed, strict=False)]
        chunked_loss = ChunkedLoss(
            unembedding,
            bias,
            inputs[0].dtype,
            needs_unembedding_grad=needs_unembedding,
            needs_bias_grad=needs_bias,
            softcap=settings.softcap,
            chunk_rows=settings.chunk_rows,
            objective=settings.objective,
        )
        input_grads: list[Tensor | None] = [None] * n_inputs
        parameter_grads: list[Tensor | None] = []
        results: dict[int, tuple[RowLosses, Tensor]] = {}
        for group in settings.groups:
            parameter_grads += _forward_backward(settings, group, inputs, chunked_loss, input_grads, results)

        ctx.grads = (chunked_loss.grad_unembedding, chunked_loss.grad_bias, *input_grads, *parameter_grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (unembedding, bias, *tensors)]
        by_head = [results[head] for head in sorted(results)]
        rows = [torch.cat(pieces) for pieces in zip(*((*losses, weights) for losses, weights in by_head), strict=True)]
        ctx.mark_non_differentiable(*rows)
        weighted = torch.stack(
            [losses.objective_losses @ weights.to(losses.objective_losses.dtype) for losses, weights in by_head]
        )  # (K,)
        return weighted @ settings.coefficients.to(weighted.dtype), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("an earlier backward pass already used the gradients of this loss")
        # In place to save memory: the largest gradient is as large as the unembedding.
        scaled = (g if g is None else g.mul_(grad_total).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, *scaled


def _forward_backward(
    settings: _LossSettings,
    group: HeadGroup,
    inputs: Sequence[Tensor],
    chunked_loss: ChunkedLoss,
    input_grads: list[Tensor | None],
    results: dict[int, tuple[RowLosses, Tensor]],
) -> list[Tensor | None]:
    """Run and differentiate one group of heads; its activations are freed on return.

    Args:
        settings: as given to `multi_head_cross_entropy`.
        group: the heads to run.
        inputs: (B, T, D) each.
        chunked_loss: accumulates the gradients of unembedding and bias.
        input_grads: (B, T, D) each; the group's gradients of `inputs` are added in place.
        results: receives losses and weights, (R,) each, of every head.

    Returns:
        The gradients of the group's parameters, None where not needed.
    """
    targets = [settings.targets[head] for head in group.heads]
    with torch.set_grad_enabled(settings.grad_enabled):
        hidden = group.hidden_states(inputs, [of_head.rows for of_head in targets])  # (R, D) for each head
    hidden_grads = []
    for i, (head, of_head) in enumerate(zip(group.heads, targets, strict=True)):
        kept = None
        if settings.live:
            current = chunked_loss.token_losses(hidden[i], of_head.targets)
            weights = settings.live(current.token_losses, of_head)  # (R,)
            kept = weights != 0  # (R,) bool; below, R counts the kept rows only
            of_head = HeadTargets(of_head.rows[kept], of_head.targets[kept], weights[kept])
            with torch.set_grad_enabled(settings.grad_enabled):
                hidden[i] = hidden[i][kept]
        scaled = of_head.weights * settings.coefficients[head]
        losses, grad = chunked_loss.losses_and_gradients(hidden[i], of_head.targets, scaled)  # grad: (R, D)
        hidden_grads.append(grad)
        if kept is None:
            results[head] = losses, of_head.weights
        else:
            scattered = torch.zeros_like(current.token_losses).masked_scatter_(kept, losses.objective_losses)
            results[head] = current._replace(objective_losses=scattered), weights
    grads = _differentiate(hidden, hidden_grads, [*inputs, *group.parameters])
    for i, grad in enumerate(grads[: len(inputs)]):
        total = input_grads[i]
        input_grads[i] = grad if total is None else total if grad is None else total.add_(grad)
    return grads[len(inputs) :]


def _differentiate(
    hidden: Sequence[Tensor], hidden_grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of `tensors` (None where not needed), given the gradients of a group's hidden states."""
    outputs = [pair for pair in zip(hidden, hidden_grads, strict=True) if pair[0].requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not outputs:
        return [None] * len(tensors)
    states, grads = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(states, wanted, grads, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]
