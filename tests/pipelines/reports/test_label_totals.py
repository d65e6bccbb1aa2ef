"""Totals by label, worked out by hand."""

import numpy as np
import pyarrow as pa

from weighted_mtp.pipelines.reports.label_totals import SHOWN_VALUES, LabelTotals


def test_values_of_several_row_groups_are_added() -> None:
    totals = LabelTotals()
    labels = pa.chunked_array([["web", "code"], ["web", None]])
    totals.add(labels, np.array([0, 0, 1, 2, 2, 3]), np.array([1, 0, 2, -1, 0, 4], np.float32))
    totals.add(pa.chunked_array([["code"]]), np.array([0, 0]), np.array([0.5, 0], np.float32))
    names, values = totals.most_frequent()
    assert names == ["web", "code", "no value"]
    assert values.targets.tolist() == [4, 3, 1]
    assert values.kept.tolist() == [2, 2, 1]
    assert values.weight.tolist() == [0, 2.5, 4]
    assert values.magnitude.tolist() == [2, 2.5, 4]


def test_rare_values_share_a_line() -> None:
    totals = LabelTotals()
    number = SHOWN_VALUES + 3
    sequences = np.repeat(np.arange(number), np.arange(number, 0, -1))  # value 0 is the most frequent
    totals.add(pa.chunked_array([[f"v{at:02}" for at in range(number)]]), sequences, np.ones(len(sequences)))
    names, values = totals.most_frequent()
    assert names == [*(f"v{at:02}" for at in range(SHOWN_VALUES)), "3 other values"]
    assert values.targets.tolist() == [*range(number, 3, -1), 3 + 2 + 1]
    assert values.kept_share.tolist() == [1] * (SHOWN_VALUES + 1)


def test_nothing_added() -> None:
    names, values = LabelTotals().most_frequent()
    assert names == []
    assert values.targets.tolist() == []
