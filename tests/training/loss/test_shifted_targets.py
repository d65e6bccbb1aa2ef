"""Targets of one row by hand: documents of three and of two tokens, and a padding token."""

import math

import pytest
import torch

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.loss.shifted_targets import select_targets, valid_targets

IDS = torch.tensor([[10, 11, 12, 20, 21, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0]])
WEIGHTS = torch.tensor([[1.0, 2, 0, 4, -5, 0]])
NAN = math.nan
COMPONENTS = torch.tensor([[[1.0, 1], [NAN, 1], [0, 0], [1, 1], [1, 1], [1, 1]]])


def test_targets_stay_in_their_document() -> None:
    assert valid_targets(POSITIONS, 1).tolist() == [[True, True, False, True, False]]
    assert valid_targets(POSITIONS, 2).tolist() == [[True, False, False, False]]
    assert valid_targets(POSITIONS, 3).tolist() == [[False, False, False]]


def test_documents_do_not_continue_in_the_next_row() -> None:
    positions = torch.tensor([[0, 1, 2], [0, 1, 2]])
    assert valid_targets(positions, 1).tolist() == [[True, True], [True, True]]
    found = select_targets(torch.tensor([[1, 2, 3], [4, 5, 6]]), positions, torch.ones(2, 3), 2)
    assert (found.rows.tolist(), found.targets.tolist()) == ([0, 3], [3, 6])


def test_positions_whose_target_has_weight_are_selected() -> None:
    found = select_targets(IDS, POSITIONS, WEIGHTS, 1)
    assert found.rows.tolist() == [0, 3]
    assert found.targets.tolist() == [11, 21]
    assert found.weights.tolist() == [2, -5]
    assert select_targets(IDS, POSITIONS, WEIGHTS, 2).rows.tolist() == []


def test_with_live_weights_every_target_with_a_score_is_selected() -> None:
    """The target at position 1 has no score. That at position 2 has zeros, which are scores."""
    found = select_targets(IDS, POSITIONS, COMPONENTS, 1, scored=True)
    assert found.rows.tolist() == [1, 3]
    assert found.targets.tolist() == [12, 21]
    assert found.weights.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("offset", [0, -1])
def test_an_offset_is_positive(offset: int) -> None:
    with pytest.raises(UserError, match=f"offset is {offset}; give 1 for the next token, or more"):
        select_targets(IDS, POSITIONS, WEIGHTS, offset)
