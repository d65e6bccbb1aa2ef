"""Packing sequences into training rows of one length, documents kept apart."""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from weighted_mtp.training.rows import Rows, silent_documents


def split_long(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut sequences that are longer than a row.

    Args:
        lengths: (S,) tokens per sequence, in the order in which they lie in the flat arrays.
        row_length: tokens per row.

    Returns:
        `starts` (P,) of each piece in the flat arrays, piece `lengths` (P,), at most `row_length`, and the number (P,)
        of the sequence that it is a piece of.
    """
    pieces = -(-lengths // row_length)
    sequence = np.repeat(np.arange(len(lengths)), pieces)
    before = (np.arange(len(sequence)) - (np.cumsum(pieces) - pieces)[sequence]) * row_length
    starts = (np.cumsum(lengths) - lengths)[sequence] + before
    return starts, np.minimum(lengths[sequence] - before, row_length), sequence


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Best-fit-decreasing bin packing: the longest piece first, each into the fullest row that still has room.

    Returns:
        (P,) int64, the row of each piece.
    """
    rows = []
    open_rows: list[int] = []  # free tokens << 32 | row, ascending: integers sort faster than tuples
    used = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for length in lengths[longest_first].tolist():
        at = bisect_left(open_rows, length << 32)
        if at == len(open_rows):
            free, row, used = row_length, used, used + 1
        else:
            entry = open_rows.pop(at)
            free, row = entry >> 32, entry & 0xFFFFFFFF
        rows.append(row)
        if free > length:
            insort(open_rows, free - length << 32 | row)
    result = np.empty(len(lengths), dtype=np.int64)
    result[longest_first] = rows
    return result


def pack(
    input_ids: np.ndarray,
    weights: np.ndarray,
    lengths: np.ndarray,
    shards: np.ndarray,
    row_length: int,
    rng: np.random.Generator | None = None,
) -> Rows:
    """Pack flat sequences into rows.

    A sequence longer than a row is cut into pieces that become documents of their own. Padding fills the end of a row
    with id 0, position 0 and weight 0: every padding token is a document of one token, so nothing attends to it or
    predicts it. Weights stay as they are, NaN included.

    Args:
        input_ids: (T,) int32, all sequences one after the other.
        weights: (T,) float32, or (T, parts).
        lengths: (S,) tokens of each sequence.
        shards: (S,) number of the shard that each sequence comes from.
        row_length: tokens per row.
        rng: puts the rows into random order; by default those with the longest pieces come first.
    """
    starts, pieces, sequence = split_long(lengths, row_length)
    row = best_fit(pieces, row_length)
    count = int(row.max()) + 1
    if rng:
        row = np.argsort(rng.permutation(count))[row]
    order = np.lexsort((-pieces, row))
    starts, pieces, row, shards = starts[order], pieces[order], row[order], shards[sequence[order]]

    # Everything below is one-dimensional, row after row; `first` is where a piece begins there.
    size = count * row_length
    tokens = np.bincount(row, pieces).astype(np.int64)
    first = np.cumsum(pieces) - pieces + row * row_length - (np.cumsum(tokens) - tokens)[row]
    last = np.append(first[1:], size) - first - 1  # how far the piece and the padding behind it reach
    # One array for all that is kept: the kernel gives large ones large pages. Small ones cost more than the packing.
    channels = np.atleast_2d(weights.T)
    packed = np.ones((2 + len(channels), size), dtype=np.int32)
    packed_ids, positions, packed_weights = packed[0], packed[1], packed[2:].view(np.float32)
    positions[first] = np.append(0, -last[:-1])
    np.cumsum(positions, out=positions)
    source = np.ones(size, dtype=np.int64)
    source[first] = np.append(starts[0], np.diff(starts) - last[:-1])
    np.cumsum(source, out=source)
    np.take(input_ids, source, out=packed_ids, mode="clip")  # padding has no source
    for channel, values in zip(channels, packed_weights, strict=True):
        np.take(channel, source, out=values, mode="clip")
    free = row_length - tokens
    padding = np.arange(free.sum()) + np.repeat(np.arange(1, count + 1) * row_length - np.cumsum(free), free)
    for values in (packed_ids, positions, *packed_weights):
        values[padding] = 0

    shape = (count, row_length)
    signal = np.abs(packed_weights[0]) > 0 if weights.ndim == 1 else np.isfinite(packed_weights).all(axis=0)
    return Rows(
        packed_ids.reshape(shape),
        positions.reshape(shape),
        packed_weights.reshape(shape)
        if weights.ndim == 1
        else np.moveaxis(packed_weights.reshape(len(channels), *shape), 0, -1),
        tokens,
        silent_documents(signal.reshape(shape), positions.reshape(shape)),
        _sources(row, shards, count),
    )


def _sources(row: np.ndarray, shards: np.ndarray, count: int) -> np.ndarray:
    """For each row the ascending numbers of the shards of its pieces, (count,) object."""
    order = np.lexsort((shards, row))
    row, shards = row[order], shards[order]
    new = np.append(True, (np.diff(row) > 0) | (np.diff(shards) > 0))
    row, shards = row[new], shards[new]
    ends = np.searchsorted(row, np.arange(count + 1)).tolist()
    return np.fromiter((shards[a:b] for a, b in pairwise(ends)), dtype=object, count=count)
