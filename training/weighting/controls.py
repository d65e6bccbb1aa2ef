"""Control weights: as uneven as a scheme's weights, but independent of the scores."""

from typing import Literal

import numpy as np

Control = Literal["none", "shuffled", "random"]


def apply_control(control: Control, weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights (N,) of S sequences with `counts` (S,) tokens each, after applying the control."""
    if control == "shuffled":
        return shuffle_within(weights, counts, rng)
    if control == "random":
        return lognormal_like(weights, rng)
    return weights


def shuffle_within(weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weights (N,) in random order within each sequence of `counts` (S,) tokens."""
    # One uint64 key per token: sequence, random bits, position. Sorting keys is several times faster than argsort.
    position_bits = len(weights).bit_length()
    sequence_bits = len(counts).bit_length()
    random_bits = 64 - position_bits - sequence_bits
    sequences = np.arange(len(counts), dtype=np.uint64) << np.uint64(64 - sequence_bits)  # (S,)
    keys = np.repeat(sequences, counts)  # (N,)
    keys |= rng.integers(1 << random_bits, size=len(weights), dtype=np.uint64) << np.uint64(position_bits)
    keys |= np.arange(len(weights), dtype=np.uint64)
    keys.sort()
    return weights[(keys & np.uint64((1 << position_bits) - 1)).astype(np.int64)]


def shuffle_between(weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights (N,) that are constant within each sequence of `counts` (S,) tokens, shuffled between the sequences."""
    nonempty = counts > 0
    firsts = (np.cumsum(counts) - counts)[nonempty]
    return np.repeat(rng.permutation(weights[firsts]), counts[nonempty])


def lognormal_like(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent LogNormal weights (N,) with the mean and variance of nonnegative `weights` (N,)."""
    if not len(weights):
        return weights
    mean, variance = float(weights.mean(dtype=np.float64)), float(weights.var(dtype=np.float64))
    if mean == 0:
        return np.zeros_like(weights)
    sigma = float(np.sqrt(np.log1p(variance / mean**2)))
    drawn = rng.standard_normal(len(weights), dtype=np.float32)
    return np.exp(drawn * sigma + (np.log(mean) - sigma**2 / 2))
