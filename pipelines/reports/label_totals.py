"""Totals of weights by the value of a label column."""

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from weighted_mtp.pipelines.reports.weight_totals import Totals

SHOWN_VALUES = 10
"""Most values of a label column shown; all others share a line."""
NO_VALUE = "no value"


class LabelTotals:
    """Totals over the targets of each value of one label column."""

    def __init__(self) -> None:
        self._by_value: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))

    def add(self, labels: pa.ChunkedArray, sequences: np.ndarray, weights: np.ndarray) -> None:
        """Add the targets of S sequences.

        Args:
            labels: (S,) strings, null for no value.
            sequences: (T,) number of each target's sequence.
            weights: (T,) weight of each target.
        """
        encoded = pc.fill_null(labels, NO_VALUE).combine_chunks().dictionary_encode()
        values, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        totals = Totals.from_weights(codes[sequences], weights, len(values))
        rows = np.stack([totals.targets, totals.kept, totals.weight, totals.magnitude], axis=1)
        for value, row in zip(values, rows, strict=True):
            self._by_value[value] += row

    def most_frequent(self) -> tuple[list[str], Totals]:
        """The values with the most targets, at most `SHOWN_VALUES`, and their totals; then those of all others."""
        ranked = sorted(self._by_value.items(), key=lambda item: (-item[1][0], item[0]))
        names = [value for value, _ in ranked[:SHOWN_VALUES]]
        rows = [row for _, row in ranked[:SHOWN_VALUES]]
        if others := [row for _, row in ranked[SHOWN_VALUES:]]:
            names.append(f"{len(others):,} other values")
            rows.append(np.sum(others, axis=0))
        return names, Totals(*np.array(rows).reshape(-1, 4).T)
