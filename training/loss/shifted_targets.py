"""Targets of every offset in packed rows, shifted labels that stay inside their document.

A packed row holds several documents. `position_ids` restart at 0 in each, and every padding token is a document of its
own. Token t+k belongs to the document of token t exactly when `position_ids[t+k] == position_ids[t] + k`.
"""

from torch import Tensor

from weighted_mtp.training.loss.multi_head import HeadTargets


def valid_targets(position_ids: Tensor, offset: int) -> Tensor:
    """Whether tokens t and t + `offset` share a document: (B, T - offset) bool for `position_ids` (B, T)."""
    return position_ids[:, offset:] == position_ids[:, :-offset] + offset


def select_targets(
    input_ids: Tensor, position_ids: Tensor, weights: Tensor, offset: int, *, scored: bool = False
) -> HeadTargets:
    """Select the positions whose target at `offset` has weight. The weight is the target's.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64.
        weights: (B, T) weight of each token as a target.
        offset: distance from a position to its target.
        scored: `weights` are components (B, T, components) of live weights; targets without NaN are selected.

    Returns:
        Indices into the (B * T) flattened positions, ascending, with targets and weights.
    """
    length = input_ids.shape[1]
    target_weights = weights[:, offset:]  # (B, T - offset[, components])
    selected = target_weights.isfinite().all(-1) if scored else target_weights != 0
    row, position = (valid_targets(position_ids, offset) & selected).nonzero(as_tuple=True)
    target = position + offset
    return HeadTargets(row * length + position, input_ids[row, target], weights[row, target])
