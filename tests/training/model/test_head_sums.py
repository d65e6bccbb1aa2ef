"""Sums over four targets, added up by hand."""

import torch

from weighted_mtp.training.model.head_sums import HeadSums


def test_rows_without_weight_do_not_count() -> None:
    """The second row has no weight and an infinite token loss; the last has a negative weight."""
    sums = HeadSums.of_rows(
        objective_losses=torch.tensor([1.0, 10, 3, 4]),
        token_losses=torch.tensor([0.5, torch.inf, 1.5, 2]),
        correct=torch.tensor([True, True, False, True]),
        weights=torch.tensor([2.0, 0, 1, -1]),
    )
    assert sums.weighted_loss.item() == 2 * 1 + 1 * 3 - 1 * 4
    assert sums.plain_loss.item() == 0.5 + 1.5 + 2
    assert sums.selected.item() == 3
    assert sums.correct.item() == 2
    assert sums.weight.item() == 2 + 1 + 1
    assert sums.squared_weight.item() == 4 + 1 + 1


def test_sums_of_each_document() -> None:
    """Of three documents, the second has no row; sums are float64, for batches of any size."""
    losses, weights = torch.tensor([1.0, 10, 3, 4]), torch.tensor([2.0, 0, 1, -1])
    correct, documents = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 2, 2])
    sums = HeadSums.of_documents(losses, losses / 2, correct, weights, documents, 3)
    assert sums.weighted_loss.tolist() == [2 * 1, 0, 1 * 3 - 1 * 4]
    assert sums.plain_loss.tolist() == [0.5, 0, 1.5 + 2]
    assert sums.selected.tolist() == [1, 0, 2]
    assert sums.correct.tolist() == [1, 0, 1]
    assert sums.weight.tolist() == [2, 0, 1 + 1]
    assert sums.squared_weight.tolist() == [4, 0, 1 + 1]
    assert {value.dtype for value in sums} == {torch.float64}


def test_no_rows_are_zeros() -> None:
    nothing = torch.zeros(0)
    sums = HeadSums.of_rows(nothing, nothing, nothing.bool(), nothing)
    assert [value.item() for value in sums] == [0] * 6


def test_zeros_have_one_entry_for_each_prediction() -> None:
    sums = HeadSums.zeros(3, torch.device("cpu"), torch.float64)
    assert all(value.dtype == torch.float64 and value.tolist() == [0, 0, 0] for value in sums)


def test_predictions_are_stacked_field_by_field() -> None:
    one, other = (HeadSums(*(torch.tensor(float(first + field)) for field in range(6))) for first in (0, 10))
    stacked = HeadSums.stack([one, other])
    assert [value.tolist() for value in stacked] == [[field, 10 + field] for field in range(6)]
