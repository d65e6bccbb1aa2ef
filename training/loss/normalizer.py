"""The normalizer of the loss, Z: one denominator for all micro-batches and processes of an optimizer step."""

from typing import NamedTuple

from torch import Tensor

from weighted_mtp.training.loss.shifted_targets import valid_targets


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

    With `scored` the weights are components (B, T, components) of live weights, and a target without NaN counts 1.
    Both results are scalars.
    """
    valid = valid_targets(position_ids, offset)
    weights = weights[:, offset:]
    sizes = weights.isfinite().all(-1).to(weights.dtype) if scored else weights.abs()
    return valid.sum(), (sizes * valid).sum()
