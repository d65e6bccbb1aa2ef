"""Exact statistics of weights, over all target tokens and by group.

The first token of a sequence is not a target and is not counted.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import pyarrow as pa

from weighted_mtp.pipelines.reports.label_totals import LabelTotals
from weighted_mtp.pipelines.reports.weight_totals import Totals
from weighted_mtp.schemas.shard_set.manifest import Manifest

MAX_DISTINCT = 8
"""Up to this many distinct values, a histogram shows each value; above, intervals."""
INTERVALS = 12
NEARLY_EQUAL = 0.02
"""Relative difference up to which weights share a line, for instance after normalising by sequence."""
NO_LABELS: Mapping[str, pa.ChunkedArray] = {}


def positions(lengths: np.ndarray) -> np.ndarray:
    """Position of each token in its sequence (T,), from sequence lengths (S,)."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class WeightStatistics:
    """Accumulates weights by row group. Keeps the weight of each target, at 4 bytes each."""

    def __init__(self, manifest: Manifest, labels: Iterable[str] = ()) -> None:
        """Start empty.

        Args:
            manifest: manifest of the set, with vocabulary size and longest sequence length.
            labels: label columns.
        """
        self.positions = manifest.longest.bit_length()
        """Number of position groups; group k starts at position `2**k` of a sequence."""
        empty = np.zeros(0, dtype=np.int64)
        self.by_id = Totals.from_weights(empty, empty, manifest.tokenizer.vocab_size)
        self.by_position = Totals.from_weights(empty, empty, self.positions)
        self.by_label = {name: LabelTotals() for name in labels}
        self.scored = self.sequences = self.silent = self.tokens = 0
        self._weights: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]

    def add(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        scored: np.ndarray,
        lengths: np.ndarray,
        labels: Mapping[str, pa.ChunkedArray] = NO_LABELS,
    ) -> None:
        """Add S consecutive sequences of T tokens in total.

        Args:
            ids: (T,) token ids.
            weights: (T,) float32.
            scored: (T,) bool, whether a token has all scores needed for its weight.
            lengths: (S,) sequence lengths, at least 1.
            labels: (S,) strings of each label column.
        """
        starts = np.cumsum(lengths) - lengths
        position = positions(lengths)  # (T,)
        target = position > 0
        target_weights = weights[target]
        self.by_id += Totals.from_weights(ids[target], target_weights, len(self.by_id.targets))
        exponents = np.frexp(position[target])[1] - 1
        self.by_position += Totals.from_weights(exponents, target_weights, self.positions)
        sequences = np.repeat(np.arange(len(lengths)), lengths)[target]
        for name, values in labels.items():
            self.by_label[name].add(values, sequences, target_weights)
        self.scored += int(np.count_nonzero(scored & target))
        kept = np.add.reduceat((weights != 0) & target, starts, dtype=np.int64)
        self.sequences += int(np.count_nonzero(lengths > 1))
        self.silent += int(np.count_nonzero((lengths > 1) & (kept == 0)))
        self.tokens += len(ids)
        self._weights.append(target_weights)

    @property
    def ascending(self) -> np.ndarray:
        """The weights of all targets in ascending order, (T,) float32."""
        if len(self._weights) > 1:
            self._weights = [np.concatenate(self._weights)]
            self._weights[0].sort()
        return self._weights[0]

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int(self.by_id.targets.sum())

    @property
    def kept(self) -> int:
        """Number of targets with nonzero weight."""
        return int(self.by_id.kept.sum())

    @property
    def mean(self) -> float:
        """Mean weight of the targets."""
        return float(self.by_id.weight.sum() / self.targets)

    @property
    def typical(self) -> float:
        """Mean absolute weight of the kept targets; 0 if there are none."""
        return float(self.by_id.magnitude.sum() / max(1, self.kept))

    @property
    def effective_share(self) -> float:
        """Effective sample size, `(sum |w|)^2 / sum w^2`, as a share of the targets; 0 if no target is kept."""
        squares = float(np.square(self.ascending, dtype=np.float64).sum())
        return float(self.by_id.magnitude.sum()) ** 2 / squares / self.targets if squares else 0.0

    def quantiles(self, shares: tuple[float, ...]) -> list[float]:
        """For each share, the smallest weight w for which this share of the targets has weight at most w."""
        ranks = np.ceil(np.array(shares) * self.targets - 1e-9).astype(np.int64)
        return self.ascending[np.maximum(ranks, 1) - 1].tolist()

    def histogram(self) -> list[tuple[str, int]]:
        """Histogram lines: a weight or interval of weights, and its number of targets.

        Intervals have equal widths up to the 99th percentile of nonzero weights; the last interval holds the rest.
        """
        weights = self.ascending[self.ascending != 0]
        lines = [("0", self.targets - self.kept)] if self.kept < self.targets else []
        distinct, counts = np.unique(weights, return_counts=True)
        if len(distinct) > 1 and distinct[-1] - distinct[0] <= NEARLY_EQUAL * abs(distinct[-1]):
            return [*lines, (f"{distinct[0]:.4g} to {distinct[-1]:.4g}", len(weights))]
        if len(distinct) <= MAX_DISTINCT:
            shown = [(f"{value:.4g}", int(count)) for value, count in zip(distinct, counts, strict=True)]
            return sorted([*lines, *shown], key=lambda line: float(line[0]))
        high = float(distinct[np.searchsorted(np.cumsum(counts), 0.99 * len(weights))])
        high = high if high > distinct[0] else float(distinct[-1])
        edges = np.linspace(float(distinct[0]), high, INTERVALS)
        interval_counts = np.bincount(np.searchsorted(edges, distinct, side="right") - 1, counts, INTERVALS).astype(int)
        names = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
        names.append(f"{edges[-1]:.3g} and more")
        return [*lines, *zip(names, interval_counts.tolist(), strict=True)]


def position_names(longest: int) -> list[str]:
    """The positions of each group of `WeightStatistics.by_position`."""
    firsts = [1 << exponent for exponent in range(longest.bit_length())]
    return [f"{first:,}" if first == 1 else f"{first:,} to {2 * first - 1:,}" for first in firsts]
