"""Short contexts: which windows give every token a loss under a limited context.

A long sequence is cut into overlapping windows; a window's first tokens are context only, its last tokens are scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from weighted_mtp.schemas.shard_set.manifest import ShortContext


@dataclass(frozen=True)
class ContextWindow:
    """One window: tokens `[start, end)` of the sequence, of which `[first_scored, end)` get their loss from it."""

    start: int
    end: int
    first_scored: int


def plan_windows(length: int, size: int, stride: int) -> Iterator[ContextWindow]:
    """Windows that score the tokens from position `size` on, each exactly once.

    Window k starts at `k * stride` and scores its last `stride` positions, so every token it scores has between
    `size - stride` and `size - 1` tokens of context. The last window may be shorter. Window 0 is left out: all its
    tokens see the start of the sequence, which makes their loss under the full context the same loss.

    Args:
        length: tokens in the sequence.
        size: tokens in a window.
        stride: tokens between the starts of two windows, less than `size`.
    """
    for start in range(stride, length - size + stride, stride):
        yield ContextWindow(start, min(start + size, length), start + size - stride)


def window_ids(ids: np.ndarray, span: ContextWindow, bos_token_id: int | None) -> np.ndarray:
    """Token ids of a window; where the sequence starts with BOS, BOS takes the place of the window's first token."""
    window = ids[span.start : span.end]
    if bos_token_id is not None and ids[0] == bos_token_id:
        window = window.copy()
        window[0] = bos_token_id
    return window


def make_short_context(size: int, stride: int | None) -> ShortContext:
    """A window with the default stride of three quarters of its size."""
    return ShortContext(size=size, stride=stride or max(1, size * 3 // 4))
