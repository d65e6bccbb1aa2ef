"""Short-context windows: overlapping windows of a sequence that give every token a loss under a limited context.

The first tokens of a window are context only; its last tokens are scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from weighted_mtp.schemas.shard_set.manifest import ShortContext


@dataclass(frozen=True)
class ContextWindow:
    """One window: tokens `[start, end)` of the sequence. Tokens `[first_scored, end)` are scored in it."""

    start: int
    end: int
    first_scored: int


def plan_windows(length: int, size: int, stride: int) -> Iterator[ContextWindow]:
    """Windows that score each token from position `size` onwards exactly once.

    Window k starts at `k * stride` and scores its last `stride` positions, so each scored token has between
    `size - stride` and `size - 1` tokens of context. The last window may be shorter. Window 0 is omitted: it starts
    with the sequence, so its losses equal those under the full context.

    Args:
        length: tokens in the sequence.
        size: tokens in a window.
        stride: tokens between the starts of two windows, less than `size`.
    """
    for start in range(stride, length - size + stride, stride):
        yield ContextWindow(start, min(start + size, length), start + size - stride)


def window_ids(ids: np.ndarray, window: ContextWindow, bos_token_id: int | None) -> np.ndarray:
    """Token ids of a window. If the sequence starts with BOS, BOS replaces the window's first token."""
    cut = ids[window.start : window.end]
    if bos_token_id is not None and ids[0] == bos_token_id:
        cut = cut.copy()
        cut[0] = bos_token_id
    return cut


def make_short_context(size: int, stride: int | None) -> ShortContext:
    """A short context; the default stride is three quarters of its size."""
    return ShortContext(size=size, stride=stride or max(1, size * 3 // 4))
