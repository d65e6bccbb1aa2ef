"""Distribution of a value over the tokens of a corpus."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Distinct finite values, ascending (D,) float64, and their token counts (D,) int64."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_values(cls, values: np.ndarray, counts: np.ndarray) -> "Distribution":
        """From values (N,), in any order and possibly repeated, and their counts (N,)."""
        distinct, index = np.unique(values.astype(np.float64), return_inverse=True)
        total = np.zeros(len(distinct), dtype=np.int64)
        np.add.at(total, index, counts)
        return cls(distinct, total)

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return float(self.values @ self.counts / self.counts.sum())

    @property
    def deviation(self) -> float:
        """Standard deviation over all tokens."""
        return float(np.sqrt((self.values - self.mean) ** 2 @ self.counts / self.counts.sum()))

    def threshold(self, fraction: float) -> float:
        """Largest value reached by at least a `fraction` of all tokens."""
        reach = np.cumsum(self.counts[::-1])[::-1]
        return float(self.values[np.flatnonzero(reach >= np.ceil(fraction * self.counts.sum() - 1e-9))[-1]])

    @property
    def ranks(self) -> np.ndarray:
        """Empirical cumulative distribution at each of `values` (D,)."""
        return np.cumsum(self.counts) / self.counts.sum()
