"""Weights that a claim about a score must beat: as uneven as those of the score, but not by it."""

from typing import Literal

import numpy as np

Control = Literal["none", "shuffled", "random"]


def apply_control(control: Control, weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weights (N,) of sequences of so many tokens, `counts` (S,), or their control."""
    if control == "shuffled":
        return shuffle_within(weights, counts, rng)
    if control == "random":
        return lognormal_like(weights, rng)
    return weights


def shuffle_within(weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same weights in random order inside each sequence."""
    # Sequence, random bits and place in one integer: sorting these is several times faster than sorting indices.
    place_bits = len(weights).bit_length()
    random_bits = 64 - place_bits - len(counts).bit_length()
    keys = np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(64 - len(counts).bit_length()), counts)
    keys |= rng.integers(1 << random_bits, size=len(weights), dtype=np.uint64) << np.uint64(place_bits)
    keys |= np.arange(len(weights), dtype=np.uint64)
    keys.sort()
    return weights[(keys & np.uint64((1 << place_bits) - 1)).astype(np.int64)]


def shuffle_between(weights: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights that are the same for all tokens of a sequence, those of the sequences in random order."""
    held = counts > 0
    firsts = (np.cumsum(counts) - counts)[held]
    return np.repeat(rng.permutation(weights[firsts]), counts[held])


def lognormal_like(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent LogNormal weights with the mean and the variance of `weights`, which are not negative."""
    if not len(weights):
        return weights
    mean, variance = float(weights.mean(dtype=np.float64)), float(weights.var(dtype=np.float64))
    if mean == 0:
        return np.zeros_like(weights)
    sigma = float(np.sqrt(np.log1p(variance / mean**2)))
    drawn = rng.standard_normal(len(weights), dtype=np.float32)
    return np.exp(drawn * sigma + (np.log(mean) - sigma**2 / 2))
