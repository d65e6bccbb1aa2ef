"""Packing of sequences into training rows of equal length, with documents kept separate."""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from weighted_mtp.training.rows import Rows, silent_documents


def split_long(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut sequences that are longer than a row into pieces.

    Args:
        lengths: (S,) tokens per sequence, in the order of the flat arrays.
        row_length: tokens per row.

    Returns:
        Start of each piece in the flat arrays (P,), its length (P,), at most `row_length`, and its sequence
        number (P,).
    """
    pieces = -(-lengths // row_length)  # (S,)
    sequence = np.repeat(np.arange(len(lengths)), pieces)  # (P,)
    offset = (np.arange(len(sequence)) - (np.cumsum(pieces) - pieces)[sequence]) * row_length  # (P,) in its sequence
    starts = (np.cumsum(lengths) - lengths)[sequence] + offset
    return starts, np.minimum(lengths[sequence] - offset, row_length), sequence


def best_fit(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Best-fit-decreasing bin packing: longest piece first, each into the fullest row with enough room.

    Returns:
        (P,) int64, the row of each piece.
    """
    rows = []
    open_rows: list[int] = []  # free tokens << 32 | row, ascending; integers sort faster than tuples
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
    sources: np.ndarray,
    row_length: int,
    rng: np.random.Generator | None = None,
) -> Rows:
    """Pack flat sequences into rows.

    A sequence longer than a row is cut into pieces, which become separate documents. Padding at the end of a row has
    id 0, position 0 and weight 0. Every padding token is a document of one token, so nothing attends to it or predicts
    it. Weights, including NaN, are copied unchanged.

    Args:
        input_ids: (T,) int32, all sequences concatenated.
        weights: (T,) float32, or (T, components).
        lengths: (S,) tokens of each sequence.
        sources: (S,) number of the shard or document of each sequence.
        row_length: tokens per row.
        rng: shuffles the rows; if None, rows with the longest pieces come first.
    """
    starts, pieces, sequence = split_long(lengths, row_length)  # (P,) each
    row = best_fit(pieces, row_length)  # (P,)
    count = int(row.max()) + 1
    if rng:
        row = np.argsort(rng.permutation(count))[row]
    order = np.lexsort((-pieces, row))  # by row, longest piece first
    starts, pieces, row, sources = starts[order], pieces[order], row[order], sources[sequence[order]]
    tokens = np.bincount(row, pieces).astype(np.int64)  # (count,)

    # Everything below is flat, row after row (count * row_length,); `first` (P,) is where each piece starts there.
    size = count * row_length
    first = np.cumsum(pieces) - pieces + row * row_length - (np.cumsum(tokens) - tokens)[row]
    last = np.append(first[1:], size) - first - 1  # (P,) last position of the piece or of the padding behind it
    # One large array for everything, which the kernel backs with huge pages. Small ones cost more than the packing.
    channels = np.atleast_2d(weights.T)  # (components, T)
    packed = np.ones((2 + len(channels), size), dtype=np.int32)
    packed_ids, positions, packed_weights = packed[0], packed[1], packed[2:].view(np.float32)
    positions[first] = np.append(0, -last[:-1])  # ones with a jump back at each piece: the sum restarts at 0
    np.cumsum(positions, out=positions)
    source = np.ones(size, dtype=np.int64)
    source[first] = np.append(starts[0], np.diff(starts) - last[:-1])  # also restarts at each piece
    np.cumsum(source, out=source)
    np.take(input_ids, source, out=packed_ids, mode="clip")  # the source of padding is meaningless
    for channel, values in zip(channels, packed_weights, strict=True):
        np.take(channel, source, out=values, mode="clip")
    free = row_length - tokens  # (count,)
    padding = np.arange(free.sum()) + np.repeat(np.arange(1, count + 1) * row_length - np.cumsum(free), free)
    for values in (packed_ids, positions, *packed_weights):
        values[padding] = 0

    ends = np.searchsorted(row, np.arange(count + 1)).tolist()
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
        np.fromiter((sources[a:b] for a, b in pairwise(ends)), dtype=object, count=count),
    )
