"""Targets of each offset in packed rows: labels shifted within their document.

A packed row holds several documents. `position_ids` restart at 0 in each, and every padding token is its own
document. Token t+k belongs to the document of token t exactly when `position_ids[t+k] == position_ids[t] + k`.
"""

from torch import Tensor

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.loss.multi_head import HeadTargets


def valid_targets(position_ids: Tensor, offset: int) -> Tensor:
    """Whether tokens t and t + `offset` share a document: (B, T - offset) bool for `position_ids` (B, T)."""
    return position_ids[:, offset:] == position_ids[:, :-offset] + offset


def select_targets(
    input_ids: Tensor, position_ids: Tensor, weights: Tensor, offset: int, *, scored: bool = False
) -> HeadTargets:
    """Select the positions whose target at `offset` has nonzero weight.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64.
        weights: (B, T), the weight of each token as a target.
        offset: distance from a position to its target.
        scored: `weights` are components (B, T, components) of live weights; targets without NaN are selected.

    Returns:
        Ascending indices into the (B * T) flattened positions, with targets and weights.

    Raises:
        UserError: `offset` is not positive.
    """
    if offset < 1:
        raise UserError(f"select_targets: offset is {offset}; give 1 for the next token, or more")
    length = input_ids.shape[1]
    target_weights = weights[:, offset:]  # (B, T - offset[, components])
    selected = target_weights.isfinite().all(-1) if scored else target_weights != 0
    row, position = (valid_targets(position_ids, offset) & selected).nonzero(as_tuple=True)
    target = position + offset
    return HeadTargets(row * length + position, input_ids[row, target], weights[row, target])
