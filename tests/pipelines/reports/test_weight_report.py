import numpy as np
import pyarrow as pa

from weighted_mtp.pipelines.reports.label_totals import LabelTotals
from weighted_mtp.pipelines.reports.weight_report import LONGEST_LABEL, label_table, ranked_ids
from weighted_mtp.pipelines.reports.weight_totals import Totals


def test_ids_are_ranked_by_how_often_they_are_kept() -> None:
    totals = Totals(
        targets=np.array([30, 20, 40, 19, 50, 60]),
        kept=np.array([15, 20, 40, 19, 0, 6]),
        weight=np.array([30.0, 20.0, 40.0, 19.0, 0.0, 60.0]),
        magnitude=np.array([30.0, 20.0, 40.0, 19.0, 0.0, 60.0]),
    )
    most, least = ranked_ids(totals, 20, by_kept=True)
    assert (most.tolist(), least.tolist()) == ([2, 1], [4, 5])
    most, least = ranked_ids(totals, 20, by_kept=False)
    assert (most.tolist(), least.tolist()) == ([5, 2], [4, 0])


def test_long_labels_are_truncated() -> None:
    totals = LabelTotals()
    totals.add(pa.chunked_array([["x" * 100]]), np.array([0]), np.array([1.0]))
    [name] = map(str, label_table("source", totals).columns[0].cells)
    assert name == "x" * LONGEST_LABEL + "..."
