"""Batches of packed rows, and of separate sequences of unequal length."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data.collate import collate_rows
from weighted_mtp.training.data.packed_rows import packed_rows


def lists(features: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in collate_rows(features).items()}


def test_packed_rows_become_the_batch_of_packed_rows(scored_set: Callable[..., ShardSet]) -> None:
    shards = scored_set([40, 9, 33, 20, 1, 17])
    settings: dict[str, Any] = {"weights": "rho1-static", "sequence_length": 32}
    own = collate_rows(list(islice(packed_rows(shards, **settings), 3)))
    expected = next(iter(packed_rows(shards, **settings, batch_size=3)))
    assert list(own) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(own[name], values, rtol=0, atol=0)


def test_sequences_are_padded_on_the_right() -> None:
    first = {"input_ids": [7, 8, 9], "weights": [0.5, 0.0, 2.0], "document_id": "a"}
    second = {"input_ids": np.array([5], np.int32), "weights": np.array([3.0], np.float32)}
    assert lists([first, second]) == {
        "input_ids": [[7, 8, 9], [5, 0, 0]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "labels": [[-100, 8, 9], [-100, -100, -100]],
        "weights": [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]],
    }


def test_labels_and_positions_of_a_row_are_kept() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "weights": [1.0, 2.0, 3.0, 4.0, 5.0], "labels": [1, -100, 3, 4, 5]}
    assert lists([row])["labels"] == [[-100, -100, 3, 4, 5]]
    assert lists([row])["weights"] == [[0, 0, 3, 4, 5]]
    packed = row | {"position_ids": [0, 1, 2, 0, 1]}
    assert lists([packed])["labels"] == [[-100, -100, 3, -100, 5]]
    assert lists([packed])["position_ids"] == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "a row has no 'weights'.* add_weighted_loss"),
        ({"input_ids": [1, 2], "weights": [1.0]}, "differ in length; give one of each for every token"),
        ({"weights": [1.0]}, "a row has no 'input_ids'"),
        ({"input_ids": [[1, 2]], "weights": [[1.0, 1.0]]}, "'input_ids' of a row has 2 dimensions; give a number"),
        ({"input_ids": ["a", "b"], "weights": [1.0, 1.0]}, "'input_ids' of a row is no list of numbers"),
        ({"input_ids": [1, 2], "weights": [1.0, 1.0], "attention_mask": [1]}, "differ in length"),
        ({"input_ids": [], "weights": []}, "no tokens; give at least one row that has some"),
        ({"input_ids": [1, 2], "weights": [1.0, float("nan")]}, "a weight is NaN or infinite; use token_weights"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        collate_rows([row])


def test_a_score_of_the_first_token_may_be_missing() -> None:
    assert lists([{"input_ids": [1, 2], "weights": [float("nan"), 3.0]}])["weights"] == [[0.0, 3.0]]


def test_no_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no tokens; give at least one row that has some"):
        collate_rows([])


def test_tokens_that_are_masked_are_left_out() -> None:
    row = {"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 2.0]}
    right = {"input_ids": [1, 2, 3, 0], "weights": [0.5, 1.0, 2.0, 7.0], "attention_mask": [1, 1, 1, 0]}
    left = {"input_ids": [0, 1, 2, 3], "weights": [7.0, 0.5, 1.0, 2.0], "attention_mask": [0, 1, 1, 1]}
    assert lists([right]) == lists([left | {"labels": [0, 1, 2, 3]}]) == lists([row | {"attention_mask": [1, 1, 1]}])
    assert lists([right]) == lists([row])
