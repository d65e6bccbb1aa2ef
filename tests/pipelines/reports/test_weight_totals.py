"""Totals of groups: joined and multiplied."""

import numpy as np

from weighted_mtp.pipelines.reports.weight_totals import Totals


def test_groups_of_several_parts_in_proportion() -> None:
    one = Totals.from_weights(np.array([0, 0, 1]), np.array([1.0, 0.0, -2.0]), 2)
    other = Totals.from_weights(np.array([0]), np.array([3.0]), 1)
    joined = Totals.concatenate([one * 0.5, other * 2])
    assert joined.targets.tolist() == [1, 0.5, 2]
    assert joined.kept.tolist() == [0.5, 0.5, 2]
    assert joined.weight.tolist() == [0.5, -1, 6]
    assert joined.magnitude.tolist() == [0.5, 1, 6]
    assert joined.kept_share.tolist() == [0.5, 1, 1]
    assert joined.mean.tolist() == [0.5, -2, 3]
