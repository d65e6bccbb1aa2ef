"""What weights look like, over all target tokens and by groups of them. All numbers are exact.

The first token of a sequence is no target, so it counts nowhere.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from weighted_mtp.schemas.shard_set.manifest import Manifest

DISTINCT = 8
"""A histogram shows so many values by themselves; of more, intervals."""
INTERVALS = 12
NARROW = 0.02
"""Weights that differ by no more than this share are one line of it, as those of sequences that are scaled each."""


@dataclass(frozen=True)
class Totals:
    """Of the targets of each of K groups: how many, how many with weight, their weights, and their absolute weights.

    `targets` and `kept` are (K,) int64, `weight` and `magnitude` (K,) float64.
    """

    targets: np.ndarray
    kept: np.ndarray
    weight: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def of(cls, groups: np.ndarray, weights: np.ndarray, size: int) -> "Totals":
        """The totals of `size` groups, from the group of each target and its weight, both (T,)."""
        wide = weights.astype(np.float64)
        return cls(
            np.bincount(groups, minlength=size),
            np.bincount(groups[weights != 0], minlength=size),
            np.bincount(groups, wide, size),
            np.bincount(groups, np.abs(wide), size),
        )

    def __add__(self, other: "Totals") -> "Totals":
        """Those of both."""
        return Totals(
            self.targets + other.targets,
            self.kept + other.kept,
            self.weight + other.weight,
            self.magnitude + other.magnitude,
        )

    def by(self, groups: np.ndarray, size: int) -> "Totals":
        """Those of `size` larger groups, of which group k here is part of `groups[k]`."""
        return Totals(
            np.bincount(groups, self.targets, size).astype(np.int64),
            np.bincount(groups, self.kept, size).astype(np.int64),
            np.bincount(groups, self.weight, size),
            np.bincount(groups, self.magnitude, size),
        )

    @property
    def kept_share(self) -> np.ndarray:
        """Share of the targets of each group that have weight, NaN without targets."""
        return divide(self.kept, self.targets)

    @property
    def mean(self) -> np.ndarray:
        """Mean weight of each group, NaN without targets."""
        return divide(self.weight, self.targets)

    @property
    def mean_magnitude(self) -> np.ndarray:
        """Mean absolute weight of each group, NaN without targets."""
        return divide(self.magnitude, self.targets)


def divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Quotients as float64, NaN where the denominator is 0."""
    empty = np.full(len(denominators), np.nan)
    return np.divide(numerators, denominators, out=empty, where=denominators != 0)


def positions(lengths: np.ndarray) -> np.ndarray:
    """Where each token of sequences of these lengths stands in its own, (T,) from lengths (S,)."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class WeightStatistics:
    """Gathers the weights of one row group after the other; keeps the weight of every target, 4 bytes each."""

    def __init__(self, manifest: Manifest) -> None:
        """Start with nothing.

        Args:
            manifest: of the set; says how many token ids there are and how long sequences get.
        """
        self.positions = manifest.longest.bit_length()
        """How many groups of positions there are: group k begins at position `2**k` of a sequence."""
        nothing = np.zeros(0, dtype=np.int64)
        self.by_id = Totals.of(nothing, nothing, manifest.tokenizer.vocab_size)
        self.by_position = Totals.of(nothing, nothing, self.positions)
        self.scored = self.sequences = self.silent = self.tokens = 0
        self._weights: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]

    def add(self, ids: np.ndarray, weights: np.ndarray, scored: np.ndarray, lengths: np.ndarray) -> None:
        """Add sequences that follow each other.

        Args:
            ids: (T,) token ids.
            weights: (T,) float32.
            scored: (T,) bool, whether a token has all scores that its weight is made of.
            lengths: (S,) of the sequences, at least 1.
        """
        starts = np.cumsum(lengths) - lengths
        position = positions(lengths)
        target = position > 0
        of_targets = weights[target]
        self.by_id += Totals.of(ids[target], of_targets, len(self.by_id.targets))
        exponents = np.frexp(position[target])[1] - 1
        self.by_position += Totals.of(exponents, of_targets, self.positions)
        self.scored += int(np.count_nonzero(scored & target))
        kept = np.add.reduceat((weights != 0) & target, starts, dtype=np.int64)
        self.sequences += int(np.count_nonzero(lengths > 1))
        self.silent += int(np.count_nonzero((lengths > 1) & (kept == 0)))
        self.tokens += len(ids)
        self._weights.append(of_targets)

    @property
    def ascending(self) -> np.ndarray:
        """The weights of all targets (T,), float32, the smallest first."""
        if len(self._weights) > 1:
            self._weights = [np.concatenate(self._weights)]
            self._weights[0].sort()
        return self._weights[0]

    @property
    def targets(self) -> int:
        """How many tokens are targets."""
        return int(self.by_id.targets.sum())

    @property
    def kept(self) -> int:
        """How many targets have a weight that is not 0."""
        return int(self.by_id.kept.sum())

    @property
    def mean(self) -> float:
        """Mean weight of the targets."""
        return float(self.by_id.weight.sum() / self.targets)

    @property
    def typical(self) -> float:
        """Mean absolute weight of the targets that have one; 0 if none has."""
        return float(self.by_id.magnitude.sum() / max(1, self.kept))

    @property
    def effective_share(self) -> float:
        """Effective sample size, `(sum |w|)^2 / sum w^2`, as a share of the targets; 0 if none has weight."""
        squares = float(np.square(self.ascending, dtype=np.float64).sum())
        return float(self.by_id.magnitude.sum()) ** 2 / squares / self.targets if squares else 0.0

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """For each share the smallest weight that so many targets do not exceed."""
        ranks = np.ceil(np.array(shares) * self.targets - 1e-9).astype(np.int64)
        return self.ascending[np.maximum(ranks, 1) - 1].tolist()

    def histogram(self) -> list[tuple[str, int]]:
        """Lines of a histogram: how many targets have a weight, or one in an interval.

        Intervals have equal widths up to the 99th percentile of the weights that are not 0; the last takes the rest.
        """
        weights = self.ascending[self.ascending != 0]
        lines = [("0", self.targets - self.kept)] if self.kept < self.targets else []
        distinct, counts = np.unique(weights, return_counts=True)
        if len(distinct) > 1 and distinct[-1] - distinct[0] <= NARROW * abs(distinct[-1]):
            return [*lines, (f"{distinct[0]:.4g} to {distinct[-1]:.4g}", len(weights))]
        if len(distinct) <= DISTINCT:
            shown = [(f"{value:.4g}", int(count)) for value, count in zip(distinct, counts, strict=True)]
            return sorted([*lines, *shown], key=lambda line: float(line[0]))
        high = float(distinct[np.searchsorted(np.cumsum(counts), 0.99 * len(weights))])
        high = high if high > distinct[0] else float(distinct[-1])
        edges = np.linspace(float(distinct[0]), high, INTERVALS)
        of_interval = np.bincount(np.searchsorted(edges, distinct, side="right") - 1, counts, INTERVALS).astype(int)
        names = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
        names.append(f"{edges[-1]:.3g} and more")
        return [*lines, *zip(names, of_interval.tolist(), strict=True)]


def position_names(longest: int) -> list[str]:
    """The positions of each group of `WeightStatistics.by_position`."""
    firsts = [1 << exponent for exponent in range(longest.bit_length())]
    return [f"{first:,}" if first == 1 else f"{first:,} to {2 * first - 1:,}" for first in firsts]
