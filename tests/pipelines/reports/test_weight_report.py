import numpy as np

from weighted_mtp.pipelines.reports.weight_report import ranked_ids
from weighted_mtp.pipelines.reports.weight_statistics import Totals


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
