"""What every head has to predict in a packed row.

A packed row holds several documents; `position_ids` restart at 0 in each of them, and every padding token is a document
of its own. Token t+k belongs to the document of token t exactly when `position_ids[t+k] == position_ids[t] + k`.
"""

from torch import Tensor

from weighted_mtp.training.loss.multi_head import HeadRows


def valid_targets(position_ids: Tensor, offset: int) -> Tensor:
    """Where position t may predict token t+`offset`: (B, T - offset) bool for `position_ids` of shape (B, T)."""
    return position_ids[:, offset:] == position_ids[:, :-offset] + offset


def count_targets(position_ids: Tensor, weights: Tensor, offset: int, *, scored: bool = False) -> tuple[Tensor, Tensor]:
    """Number of valid targets at `offset`, int64, and the sum of their weights, in the dtype of weights: two scalars.

    With `scored` the weights (B, T, parts) are what weights will be made of: a target that has all of it counts 1.
    Negative weights count by their size.
    """
    valid = valid_targets(position_ids, offset)
    weights = weights[:, offset:]
    return valid.sum(), ((weights.isfinite().all(-1).to(weights.dtype) if scored else weights.abs()) * valid).sum()


def target_rows(
    input_ids: Tensor, position_ids: Tensor, weights: Tensor, offset: int, *, scored: bool = False
) -> HeadRows:
    """The positions whose prediction at `offset` carries weight. The weight is the target's.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64.
        weights: (B, T) one weight per token, as a target.
        offset: how far ahead the target lies.
        scored: `weights` (B, T, parts) are what weights will be made of; targets without NaN there are taken.

    Returns:
        Indices into the (B * T) flattened positions, ascending, with targets and weights.
    """
    length = input_ids.shape[1]
    ahead = weights[:, offset:]
    carries = ahead.isfinite().all(-1) if scored else ahead != 0
    batch, at = (valid_targets(position_ids, offset) & carries).nonzero(as_tuple=True)
    return HeadRows(batch * length + at, input_ids[batch, at + offset], weights[batch, at + offset])
