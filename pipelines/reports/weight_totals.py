"""Totals of weights over the targets of groups."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Totals:
    """Totals over the targets of K groups.

    Attributes:
        targets: (K,) number of targets.
        kept: (K,) number of targets whose weight is not 0.
        weight: (K,) float64, sum of the weights.
        magnitude: (K,) float64, sum of the absolute weights.
    """

    targets: np.ndarray
    kept: np.ndarray
    weight: np.ndarray
    magnitude: np.ndarray

    @classmethod
    def from_weights(cls, groups: np.ndarray, weights: np.ndarray, size: int) -> "Totals":
        """Totals of `size` groups, from each target's group and weight, both (T,)."""
        weights_float64 = weights.astype(np.float64)
        return cls(
            np.bincount(groups, minlength=size),
            np.bincount(groups[weights != 0], minlength=size),
            np.bincount(groups, weights_float64, size),
            np.bincount(groups, np.abs(weights_float64), size),
        )

    def __add__(self, other: "Totals") -> "Totals":
        """Sum of both totals."""
        return Totals(
            self.targets + other.targets,
            self.kept + other.kept,
            self.weight + other.weight,
            self.magnitude + other.magnitude,
        )

    def __mul__(self, factor: float) -> "Totals":
        """All totals times `factor`, for groups that count more often than once."""
        return Totals(self.targets * factor, self.kept * factor, self.weight * factor, self.magnitude * factor)

    @classmethod
    def concatenate(cls, parts: Sequence["Totals"]) -> "Totals":
        """The groups of all parts, one after another."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def by(self, groups: np.ndarray, size: int) -> "Totals":
        """Totals of `size` larger groups; `groups` (K,) maps each group to its larger group."""
        return Totals(
            np.bincount(groups, self.targets, size).astype(np.int64),
            np.bincount(groups, self.kept, size).astype(np.int64),
            np.bincount(groups, self.weight, size),
            np.bincount(groups, self.magnitude, size),
        )

    @property
    def kept_share(self) -> np.ndarray:
        """Share of each group's targets with nonzero weight, NaN for an empty group."""
        return divide(self.kept, self.targets)

    @property
    def mean(self) -> np.ndarray:
        """Mean weight of each group, NaN for an empty group."""
        return divide(self.weight, self.targets)

    @property
    def mean_magnitude(self) -> np.ndarray:
        """Mean absolute weight of each group, NaN for an empty group."""
        return divide(self.magnitude, self.targets)


def divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Quotients as float64, NaN where the denominator is 0."""
    empty = np.full(len(denominators), np.nan)
    return np.divide(numerators, denominators, out=empty, where=denominators != 0)
