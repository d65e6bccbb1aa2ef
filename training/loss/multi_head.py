"""Weighted losses of all heads against one shared unembedding, without ever holding the logits of all rows.

The weights of the rows are known before the forward pass. So rows of weight 0 never come here, and all gradients are
formed while a chunk of logits is at hand (see `training.loss.output_layer`). Heads are run and differentiated one after
the other (arXiv 2404.19737, section 2): beyond one chunk of logits and the activations of one head, what is held until
the backward pass is a gradient for each input and each parameter, however many heads there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weighted_mtp.training.loss.objectives import Objective
from weighted_mtp.training.loss.output_layer import CHUNK_ROWS, OutputLayer, RowLosses


class HeadRows(NamedTuple):
    """What one head has to predict.

    Attributes:
        rows: (R,) int64, indices into the flattened positions of a batch.
        targets: (R,) int64, all of them valid token ids, or what else the objective takes.
        weights: (R,) floating; (R, parts) where live weights will be made of them.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class HeadGroup:
    """Heads whose hidden states are computed together: one parallel head, or a chain of sequential modules.

    Attributes:
        heads: their numbers, ascending.
        hidden_states: maps the inputs and, for each of the heads, (R,) rows to hidden states (R, D).
        parameters: what it needs besides the inputs and may be trained.
    """

    heads: Sequence[int]
    hidden_states: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    parameters: Sequence[Tensor] = ()


class HeadLosses(NamedTuple):
    """Losses of all heads, those of one head after those of the other.

    Attributes:
        total: scalar with gradients, the sum over heads k and rows r of `coefficients[k] * weights[r] * values[r]`.
        values: (sum of R,) float32 (float64 for float64 input), what the objective minimises, without gradients; 0 for
            rows that live weights leave out.
        losses: (sum of R,) likewise, what is logged and ranked as the loss, nats.
        correct: (sum of R,) bool, whether the target is the most likely token.
        weights: (sum of R,) the weights that were used.
    """

    total: Tensor
    values: Tensor
    losses: Tensor
    correct: Tensor
    weights: Tensor


WeighLive = Callable[[Tensor, HeadRows], Tensor]
"""Turns the current losses (R,) of the rows of a head, whose `weights` are what they are made of, into weights (R,)."""


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
        targets: (R,) int64, all of them valid token ids.
        weights: (R,).
        bias: (V,) or None.
        softcap: bound of the logits, or None.
        chunk_rows: rows whose logits are held at once.
        objective: what is summed up in place of the negative log-likelihood.

    Returns:
        The weighted sum, a scalar with gradients for `hidden_states`, `unembedding` and `bias`, and the (R,) losses
        in nats without gradients. See `multi_head_cross_entropy`, of which this is the simplest case.
    """
    everything = HeadRows(torch.arange(len(targets), device=targets.device), targets, weights)
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
    return result.total, result.losses


def multi_head_cross_entropy(
    inputs: Sequence[Tensor],
    groups: Sequence[HeadGroup],
    tasks: Sequence[HeadRows],
    unembedding: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int = CHUNK_ROWS,
    live: WeighLive | None = None,
    objective: Objective | None = None,
) -> HeadLosses:
    """Weighted cross-entropy of several heads, or what else `objective` says.

    With `softcap` c the logits are `c * tanh(z / c)` (Gemma 2, arXiv 2408.00118, section 2). Softmax and losses are
    computed in float32 (float64 for float64 input), matrix products in the autocast dtype where autocast is on, else
    in that of the hidden states; on a CPU always in float32 at least, where bfloat16 products are many times slower.

    Args:
        inputs: what the groups share, as the trunk's hidden states; they may need gradients.
        groups: together they have every head once.
        tasks: for each head, what it has to predict.
        unembedding: (V, D), shared by all heads.
        coefficients: (K,) factor of each head's losses.
        bias: (V,) or None.
        softcap: bound of the logits, or None.
        chunk_rows: rows whose logits are held at once.
        live: makes the weights from the negative log-likelihoods. All rows are then first predicted without
            gradients, and those that get a weight once more.
        objective: what is minimised for a row; the negative log-likelihood by default.

    Returns:
        The losses. Gradients are built here already, so `total` can be differentiated once.
    """
    plan = _Plan(groups, tasks, coefficients, softcap, chunk_rows, live, objective, torch.is_grad_enabled())
    parameters = [parameter for group in groups for parameter in group.parameters]
    return HeadLosses(*_MultiHeadCrossEntropy.apply(plan, len(inputs), unembedding, bias, *inputs, *parameters))


@dataclass(frozen=True)
class _Plan:
    groups: Sequence[HeadGroup]
    tasks: Sequence[HeadRows]
    coefficients: Tensor
    softcap: float | None
    chunk_rows: int
    live: WeighLive | None
    objective: Objective | None
    grad_enabled: bool


class _MultiHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, n_inputs: int, unembedding: Tensor, bias: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        # Under no_grad autograd still says that parameters need gradients.
        needs_matrix, needs_bias, *needed = [plan.grad_enabled and needs for needs in ctx.needs_input_grad[2:]]
        inputs = [tensor.detach().requires_grad_(n) for tensor, n in zip(tensors[:n_inputs], needed, strict=False)]
        output_layer = OutputLayer(
            unembedding,
            bias,
            inputs[0].dtype,
            needs_matrix=needs_matrix,
            needs_bias=needs_bias,
            softcap=plan.softcap,
            chunk_rows=plan.chunk_rows,
            objective=plan.objective,
        )
        input_grads: list[Tensor | None] = [None] * n_inputs
        parameter_grads: list[Tensor | None] = []
        results: dict[int, tuple[RowLosses, Tensor]] = {}
        for group in plan.groups:
            parameter_grads += _run_group(plan, group, inputs, output_layer, input_grads, results)

        ctx.grads = (output_layer.grad_matrix, output_layer.grad_bias, *input_grads, *parameter_grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (unembedding, bias, *tensors)]
        by_head = [results[head] for head in sorted(results)]
        rows = [torch.cat(parts) for parts in zip(*((*found, weights) for found, weights in by_head), strict=True)]
        ctx.mark_non_differentiable(*rows)
        weighted = torch.stack([found.values @ weights.to(found.values.dtype) for found, weights in by_head])
        return weighted @ plan.coefficients.to(weighted.dtype), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of this loss were used up by an earlier backward pass")
        # In place, as nobody else holds them: the largest is as large as the unembedding.
        scaled = (g if g is None else g.mul_(grad_total).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, *scaled


def _run_group(
    plan: _Plan,
    group: HeadGroup,
    inputs: Sequence[Tensor],
    output_layer: OutputLayer,
    input_grads: list[Tensor | None],
    results: dict[int, tuple[RowLosses, Tensor]],
) -> list[Tensor | None]:
    """Enter losses into `results`, add to `input_grads` in place, and return the gradients of the group's parameters.

    Nothing else of the group is left when the next one comes.
    """
    tasks = [plan.tasks[head] for head in group.heads]
    with torch.set_grad_enabled(plan.grad_enabled):
        hidden = group.hidden_states(inputs, [task.rows for task in tasks])
    hidden_grads = []
    for i, (head, task) in enumerate(zip(group.heads, tasks, strict=True)):
        kept = None
        if plan.live:
            plain = output_layer.losses(hidden[i], task.targets)
            weights = plan.live(plain.losses, task)
            kept = weights != 0
            task = HeadRows(task.rows[kept], task.targets[kept], weights[kept])
            with torch.set_grad_enabled(plan.grad_enabled):
                hidden[i] = hidden[i][kept]
        scaled = task.weights * plan.coefficients[head]
        found, grad = output_layer.losses_and_gradients(hidden[i], task.targets, scaled)
        hidden_grads.append(grad)
        if kept is None:
            results[head] = found, task.weights
        else:
            values = torch.zeros_like(plain.losses).masked_scatter_(kept, found.values)
            results[head] = plain._replace(values=values), weights
    grads = _differentiate(hidden, hidden_grads, [*inputs, *group.parameters])
    for i, grad in enumerate(grads[: len(inputs)]):
        total = input_grads[i]
        input_grads[i] = grad if total is None else total if grad is None else total.add_(grad)
    return grads[len(inputs) :]


def _differentiate(
    hidden: Sequence[Tensor], hidden_grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of `tensors`, None where none is needed, from those of the hidden states of a group."""
    outputs = [pair for pair in zip(hidden, hidden_grads, strict=True) if pair[0].requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if not outputs:
        return [None] * len(tensors)
    states, grads = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(states, wanted, grads, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]
