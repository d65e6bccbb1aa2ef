"""Metrics of two steps, worked out by hand, and their state in a checkpoint."""

import math

import numpy as np
import torch
from accelerate import Accelerator

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.training.metrics import MetricsAccumulator
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.rows import Rows

HEADS = HeadsConfig(offsets=(1, 2))


def no_flops(*_: object) -> float:
    return 0.0


def accumulated() -> MetricsAccumulator:
    """Two steps: 4 of 8 targets selected in each, with weights 1, 1, 2 and 2."""
    accumulator = MetricsAccumulator(HEADS, torch.device("cpu"))
    positions = np.array([[0, 1, 2, 3, 4, 0]], np.int32)
    tokens, silent = np.array([5]), np.array([1])
    rows = Rows(positions, positions, np.ones((1, 6), np.float32), tokens, silent, np.empty(1, object))
    for loss in (1.0, 2.0):
        accumulator.count_rows(rows)
        sums = HeadSums(*(torch.tensor(pair) for pair in
            ([loss, 3.0], [8.0, 6.0], [4.0, 2.0], [1.0, 0.0], [6.0, 3.0], [10.0, 5.0])))  # fmt: skip
        accumulator.add_step(sums, torch.tensor([1.0, 0.5]), targets=8)
    return accumulator


def test_metrics_worked_by_hand() -> None:
    accumulator = accumulated()
    metrics = accumulator.compute_and_reset(Accelerator(cpu=True), no_flops, 2.0, None)
    assert metrics["loss"] == (1 + 2 + 2 * 0.5 * 3) / 2
    assert (metrics["weighted_loss_1"], metrics["weighted_loss_2"]) == (1.5, 3.0)
    assert (metrics["plain_loss_1"], metrics["plain_loss_2"]) == (2.0, 3.0)
    assert (metrics["accuracy_1"], metrics["accuracy_2"]) == (0.25, 0.0)
    assert metrics["selected_share"] == 0.5
    assert metrics["effective_share"] == 12**2 / (20 * 16)
    assert metrics["tokens_per_second"] == 5.0
    assert metrics["no_signal_documents"] == 2
    empty = accumulator.compute_and_reset(Accelerator(cpu=True), no_flops, 3.0, None)
    assert all(math.isnan(empty[name]) for name in ("loss", "plain_loss_1", "selected_share", "effective_share"))
    assert empty["no_signal_documents"] == 2  # counted over the whole run


def test_state_continues_in_the_main_process_alone() -> None:
    state = accumulated().state_dict()
    assert state["head_sums"].tolist() == [[3, 16, 8, 2, 12, 20], [6, 12, 4, 0, 6, 10]]
    for main_process in (True, False):
        restored = MetricsAccumulator(HEADS, torch.device("cpu"))
        restored.load_state_dict(state, main_process=main_process)
        assert restored.loss.item() == (6.0 if main_process else 0.0)
        assert restored.head_sums.plain_loss.tolist() == ([16, 12] if main_process else [0, 0])
        assert (restored.steps, restored.targets) == (2, 16)
