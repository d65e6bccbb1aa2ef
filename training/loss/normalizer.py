"""The normalizer of the loss, Z: one denominator for all micro-batches and processes of an optimizer step."""

from typing import NamedTuple

from torch import Tensor

from weighted_mtp.training.loss.shifted_targets import valid_targets
from weighted_mtp.training.rows import IGNORED


class StepNormalizer(NamedTuple):
    """Targets of one optimizer step, over all micro-batches and processes.

    Attributes:
        targets: number of targets of the first offset.
        weight_sum: sum of their absolute weights; 0 if there is nothing to learn.
        value: Z, the denominator of the loss: `targets` or `weight_sum`, as `--normalization` says.
    """

    targets: float
    weight_sum: float
    value: float


def count_targets(position_ids: Tensor, weights: Tensor, offset: int, *, scored: bool = False) -> tuple[Tensor, Tensor]:
    """Number of valid targets at `offset`, int64, and the sum of their absolute weights, in the dtype of weights.

    With `scored`, the weights are components (B, T, components) of live weights, and each target without NaN counts as
    1. Both results are scalars.
    """
    valid = valid_targets(position_ids, offset)
    weights = weights[:, offset:]
    sizes = weights.isfinite().all(-1).to(weights.dtype) if scored else weights.abs()
    return valid.sum(), (sizes * valid).sum()


def mean_if_labelled(total: Tensor, labels: Tensor | None, targets: Tensor | int | None) -> Tensor:
    """A summed loss as models of transformers return it: a mean if there are labels.

    Args:
        total: scalar, sum over the targets of a batch.
        labels: (B, T), -100 for tokens that are no targets; without labels the result is `total`.
        targets: the number of targets to divide by; by default that of the labels.
    """
    if labels is None:
        return total
    return total / ((labels != IGNORED).sum().clamp(min=1) if targets is None else targets)
