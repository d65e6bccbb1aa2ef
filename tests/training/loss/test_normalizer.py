"""Counts of targets of one row by hand: documents of three and of two tokens, and a padding token."""

import math

import torch

from weighted_mtp.training.loss.normalizer import count_targets, mean_if_labelled

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0]])
WEIGHTS = torch.tensor([[1.0, 2, 0, 4, -5, 0]])
NAN = math.nan
COMPONENTS = torch.tensor([[[1.0, 1], [NAN, 1], [0, 0], [1, 1], [1, 1], [1, 1]]])


def test_targets_count_with_and_without_weight() -> None:
    targets, weight = count_targets(POSITIONS, WEIGHTS, 1)
    assert (targets.item(), weight.item()) == (3, 2 + 0 + 5)
    targets, weight = count_targets(POSITIONS, WEIGHTS, 2)
    assert (targets.item(), weight.item()) == (1, 0)


def test_with_live_weights_every_target_with_a_score_counts() -> None:
    """The target at position 1 has no score. The components of the target at position 2 are zeros, which are scores."""
    targets, scored = count_targets(POSITIONS, COMPONENTS, 1, scored=True)
    assert (targets.item(), scored.item()) == (3, 2)


def test_a_summed_loss_becomes_a_mean_with_labels() -> None:
    total, labels = torch.tensor(12.0), torch.tensor([[-100, 5, 6, -100, 7, -100]])
    assert mean_if_labelled(total, None, 6) == 12
    assert mean_if_labelled(total, labels, None) == 4
    assert mean_if_labelled(total, labels, 6) == 2
    assert mean_if_labelled(total * 0, torch.full((1, 4), -100), None) == 0
