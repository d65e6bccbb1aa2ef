"""Score columns to one weight per target token. Everything here is decided before any forward pass.

A scheme is made ready once for a shard set (`make_weighting`: corpus-wide thresholds and means come exactly from the
set's value counts) and is then applied to one row group at a time. Sources of the schemes: rho1-static, Token Cleaning
(arXiv 2502.01968) after Rho-1 (2404.07965); dense and sparse, token weighting for long-range language modelling
(2503.09202); LogNormal and shuffled controls, so that an effect can be told from that of any uneven weighting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from schemas.configs import WeightsConfig
from schemas.errors import UserError
from schemas.zipped import ZippedSets

DEFAULT_COLUMNS = {
    "rho1": "loss_reference",
    "rho1-static": "excess_loss",
    "soft-threshold": "excess_loss",
    "dense": "long_short",
    "sparse": "long_short",
}


@dataclass(frozen=True)
class Weighting:
    """A scheme ready to use.

    `column` is the score column it reads (None for uniform weights). Calling it turns the flat float16 scores of
    consecutive sequences (T,), their lengths (S,), and a random generator for the controls into float32 weights (T,).
    Tokens without a score get weight 0. A weight that follows from the score alone is looked up in a `table` of all
    float16 values (65536,), several times faster than it is computed.
    """

    column: str | None
    scheme: Callable[[np.ndarray, np.ndarray], np.ndarray]
    control: Literal["none", "shuffled", "random"] = "none"
    table: np.ndarray | None = None

    def __call__(self, scores: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Weights (T,) float32 of the flat scores (T,) of sequences with the given lengths (S,)."""
        if self.table is not None and self.control == "none":
            return self.table[scores.view(np.uint16)]
        scored = np.isfinite(scores)
        scored_lengths = np.add.reduceat(scored, _starts(lengths), dtype=np.int64)
        weights = self.scheme(scores[scored], scored_lengths)
        if self.control == "shuffled":
            weights = shuffle_within(weights, scored_lengths, rng)
        elif self.control == "random":
            weights = lognormal_like(weights, rng)
        result = np.zeros(len(scores), dtype=np.float32)
        result[scored] = weights
        return result


@dataclass(frozen=True)
class StoredScores:
    """For live schemes, which `training.live` makes of stored scores while training: hands these on as they are."""

    column: str

    def __call__(self, scores: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The scores (T,) float32, NaN where a token has none."""
        return scores.astype(np.float32)


def make_weighting(config: WeightsConfig, shards: ZippedSets) -> Weighting | StoredScores:
    """Prepare the scheme of `config` for `shards`, scaled so that scored tokens have mean weight 1 over the corpus.

    Raises:
        UserError: no set has the score column, its statistics are missing, or no token would have weight.
    """
    column = column_of(config)
    if column is None:
        return elementwise(None, lambda scores: np.ones(len(scores), dtype=np.float32))
    holder = shards.holder(column)
    counts = holder.value_counts()[column]
    values = counts.distinct()[0]
    if not len(values):
        raise UserError(f"{holder.path}: column '{column}' has no score at all; choose another --weights.column")
    if config.is_live:
        return StoredScores(column)
    if not values.any():
        raise UserError(f"{holder.path}: column '{column}' has no value but 0; choose another --weights.column")
    if config.preset == "dense":
        return Weighting(column, partial(dense, lam=config.lam), config.control)
    if config.preset == "sparse":
        return Weighting(column, partial(sparse, fraction=config.fraction), config.control)
    weigh: Callable[[np.ndarray], np.ndarray] = (
        partial(at_least, threshold=counts.top_threshold(config.fraction))
        if config.preset == "rho1-static"
        else partial(soft_threshold, tau=config.tau)
    )
    mean = counts.mean_of(weigh)
    if mean == 0:
        raise UserError(f"{holder.path}: column '{column}' is positive nowhere; choose another --weights.preset")
    return elementwise(column, lambda scores: weigh(scores) * np.float32(1 / mean), config.control)


def column_of(config: WeightsConfig) -> str | None:
    """Name of the score column that weights are made of; None for uniform ones."""
    default = "loss_short" if config.live else DEFAULT_COLUMNS.get(config.preset)
    return config.column or default


def elementwise(
    column: str | None,
    weigh: Callable[[np.ndarray], np.ndarray],
    control: Literal["none", "shuffled", "random"] = "none",
) -> Weighting:
    """The scheme in which the weight of a token is `weigh` of its score, float32."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(values)
    table = np.zeros(1 << 16, dtype=np.float32)
    table[finite] = weigh(values[finite].astype(np.float32))
    return Weighting(column, lambda scores, lengths: table[scores.view(np.uint16)], control, table)


def at_least(scores: np.ndarray, threshold: float) -> np.ndarray:
    """1 where the score reaches `threshold`, else 0."""
    return (scores >= np.float32(threshold)).astype(np.float32)


def soft_threshold(scores: np.ndarray, tau: float) -> np.ndarray:
    """`min(s / tau, 1)` for s > 0, else 0."""
    return np.clip(scores / np.float32(tau), 0, 1)


def dense(scores: np.ndarray, lengths: np.ndarray, lam: float) -> np.ndarray:
    """`lam + (1 - lam) * |s| / mean(|s|)`, the mean taken over each sequence (arXiv 2503.09202, lambda).

    A sequence of all zero scores carries no signal: its weights are `lam`.
    """
    magnitude = np.abs(scores.astype(np.float32))
    means = _segment_sums(magnitude, lengths) / np.maximum(lengths, 1)
    magnitude *= np.repeat(((1 - lam) / np.where(means > 0, means, 1)).astype(np.float32), lengths)
    magnitude += np.float32(lam)
    return magnitude


def sparse(scores: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Keep the `fraction` of each sequence with the largest |s|, scaled to mean 1 (arXiv 2503.09202, kappa).

    Ties at the threshold are kept. A sequence of all zero scores carries no signal and gets weight 0, unless
    `fraction` is 1, which keeps every token of every sequence.
    """
    if fraction == 1:
        return np.ones(len(scores), dtype=np.float32)
    # Bit patterns of non-negative float16 order like the values, so one integer sort ranks all sequences at once.
    wide = np.uint32 if len(lengths) < 1 << 16 else np.uint64
    first_keys = np.left_shift(np.arange(len(lengths)), 16).astype(wide)
    keys = np.repeat(first_keys, lengths)
    keys |= scores.astype(np.float16, copy=False).view(np.uint16) & 0x7FFF
    ranked = np.sort(keys)
    ends = np.cumsum(lengths)
    kept = np.ceil(fraction * lengths - 1e-9).astype(np.int64)
    threshold = np.full(len(lengths), np.iinfo(wide).max, dtype=wide)
    has_signal = lengths > 0
    has_signal[has_signal] = ranked[ends[has_signal] - 1] > first_keys[has_signal]
    threshold[has_signal] = ranked[(ends - kept)[has_signal]]
    selected = keys >= np.repeat(threshold, lengths)
    total = np.append(0, np.cumsum(selected, dtype=np.int64))
    counts = total[ends] - total[ends - lengths]
    scale = (lengths / np.maximum(counts, 1)).astype(np.float32)
    return selected * np.repeat(scale, lengths)


def shuffle_within(weights: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same weights in random order inside each sequence."""
    segment = np.repeat(np.arange(len(lengths)), lengths)
    return weights[np.lexsort((rng.random(len(weights)), segment))]


def lognormal_like(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent LogNormal weights with the mean and the variance of `weights`."""
    mean, variance = float(weights.mean(dtype=np.float64)), float(weights.var(dtype=np.float64))
    if mean == 0:
        return weights
    sigma = np.sqrt(np.log1p(variance / mean**2))
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, len(weights)).astype(np.float32)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _segment_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum of each segment, float64 (S,); 0 for an empty segment."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.cumsum(lengths)
    return total[ends] - total[ends - lengths]
