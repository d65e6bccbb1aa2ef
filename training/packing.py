"""Packing sequences into training rows of one length, documents kept apart."""

from bisect import bisect_left, insort

import numpy as np


def split_long(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut sequences that are longer than a row.

    Args:
        lengths: (S,) tokens per sequence, in the order in which they lie in the flat arrays.
        row_length: tokens per row.

    Returns:
        `starts` (P,) of each piece in the flat arrays and piece `lengths` (P,), at most `row_length`.
    """
    pieces = -(-lengths // row_length)
    index = _count_within(pieces)
    starts = np.repeat(np.cumsum(lengths) - lengths, pieces) + index * row_length
    remaining = np.repeat(lengths, pieces) - index * row_length
    return starts, np.minimum(remaining, row_length)


def best_fit(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the longest piece first, each into the fullest row that still has room.

    Returns:
        For each row the indices of its pieces.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(open_rows, (length, -1))
        if at == len(open_rows):
            rows.append([])
            free, row = row_length, len(rows) - 1
        else:
            free, row = open_rows.pop(at)
        rows[row].append(piece)
        if free > length:
            insort(open_rows, (free - length, row))
    return rows


def pack(
    input_ids: np.ndarray, weights: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pack flat sequences into rows.

    A sequence longer than a row is cut into pieces that become documents of their own. Padding fills the end of a row
    with id 0, position 0 and weight 0: every padding token is a document of one token, so nothing attends to it or
    predicts it.

    Args:
        input_ids: (T,) int32, all sequences one after the other.
        weights: (T,) float32.
        lengths: (S,) tokens of each sequence.
        row_length: tokens per row.

    Returns:
        `input_ids` (R, L) int32, `position_ids` (R, L) int32, `weights` (R, L) float32, and (R,) int64
        how many tokens of each row are not padding.
    """
    starts, pieces = split_long(lengths, row_length)
    rows = best_fit(pieces, row_length)
    order = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    piece_lengths = pieces[order]
    within = _count_within(piece_lengths)
    source = np.repeat(starts[order], piece_lengths) + within
    row_tokens = np.array([pieces[row].sum() for row in rows])
    row_of_token = np.repeat(np.arange(len(rows)), row_tokens)
    column = _count_within(row_tokens)
    packed = tuple(np.zeros((len(rows), row_length), dtype=dtype) for dtype in (np.int32, np.int32, np.float32))
    for target, values in zip(packed, (input_ids[source], within, weights[source]), strict=True):
        target[row_of_token, column] = values
    return packed[0], packed[1], packed[2], row_tokens


def _count_within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... in each of consecutive segments of the given lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
