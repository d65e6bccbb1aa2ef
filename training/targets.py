"""What every head has to predict in a packed row.

A packed row holds several documents; `position_ids` restart at 0 in each of them, and every padding token is a document
of its own. Token t+k belongs to the document of token t exactly when `position_ids[t+k] == position_ids[t] + k`.
"""

from torch import Tensor


def valid_targets(position_ids: Tensor, offset: int) -> Tensor:
    """Where position t may predict token t+`offset`: (B, T - offset) bool for `position_ids` of shape (B, T)."""
    return position_ids[:, offset:] == position_ids[:, :-offset] + offset


def count_targets(position_ids: Tensor, weights: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Number of valid targets at `offset` and the sum of their weights: two scalars, int64 and the dtype of weights."""
    valid = valid_targets(position_ids, offset)
    return valid.sum(), (weights[:, offset:] * valid).sum()


def weighted_rows(input_ids: Tensor, position_ids: Tensor, weights: Tensor, offset: int) -> tuple[Tensor, ...]:
    """The positions whose prediction at `offset` carries weight. The weight is the target's.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64.
        weights: (B, T) one weight per token, as a target.
        offset: how far ahead the target lies.

    Returns:
        `rows` (R,) indices into the (B * T) flattened positions, `targets` (R,) int64, `target_weights` (R,), all > 0.
    """
    length = input_ids.shape[1]
    batch, at = (valid_targets(position_ids, offset) & (weights[:, offset:] > 0)).nonzero(as_tuple=True)
    return batch * length + at, input_ids[batch, at + offset], weights[batch, at + offset]
