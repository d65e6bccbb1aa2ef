"""Sequences of a set as NumPy arrays, in stored order."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set import shards as shards_module
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import ShardFile

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[math.nan, 1, 2], [math.nan, 0.5], [math.nan, 4, 4, 4]]


@pytest.fixture
def scored(make_shard_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """Two shards, the first with two row groups."""
    monkeypatch.setattr(shards_module, "ROW_GROUP_TOKENS", 2)
    carried = {"reward": [0.5, -1.0, 2.0], "group": ["a", "b", "a"]}
    return make_shard_set(
        SEQUENCES, {"loss_reference": LOSSES}, sequence_columns=carried, document_starts=[0, 7, 0], rows_per_shard=2
    )


def test_every_sequence_comes_once_with_the_columns_asked_for(scored: ShardSet) -> None:
    assert [shard.row_groups for shard in scored.manifest.shards] == [2, 1]
    found = list(scored.sequences(columns=["group", "loss_reference", "reward"]))
    assert [sequence.document_id for sequence in found] == ["doc-0", "doc-1", "doc-2"]
    assert [sequence.start for sequence in found] == [0, 7, 0]
    assert [sequence.input_ids.tolist() for sequence in found] == SEQUENCES
    assert [sequence.columns["reward"] for sequence in found] == [0.5, -1.0, 2.0]
    assert [sequence.columns["group"] for sequence in found] == ["a", "b", "a"]
    for sequence, losses in zip(found, LOSSES, strict=True):
        assert list(sequence.columns) == ["group", "loss_reference", "reward"]
        np.testing.assert_array_equal(sequence.columns["loss_reference"], np.array(losses, np.float32))
        assert (sequence.input_ids.dtype, sequence.columns["loss_reference"].dtype) == (np.int32, np.float32)
        sequence.input_ids[0] = 0  # a copy of its own, not Arrow's memory


def test_all_columns_are_the_default_and_none_are_possible(scored: ShardSet) -> None:
    assert list(next(scored.sequences()).columns) == ["reward", "group", "loss_reference"]
    assert next(scored.sequences(columns=[])).columns == {}
    assert list(next(scored.sequences("reward")).columns) == ["reward"]


def test_a_column_that_is_not_there_is_refused_before_reading(scored: ShardSet) -> None:
    with pytest.raises(UserError, match="has no column 'loss'; choose among reward, group, loss_reference"):
        scored.sequences(columns=["loss"])


def test_row_groups_are_read_one_by_one(scored: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int | None]] = []
    original = ShardFile.read

    def recorded(self: ShardFile, columns: list[str] | None = None, row_group: int | None = None) -> object:
        read.append((self.entry.name, row_group))
        return original(self, columns, row_group)

    monkeypatch.setattr(ShardFile, "read", recorded)
    sequences = scored.sequences()
    next(sequences)
    assert read == [("shard-00000-of-00002.parquet", 0)]
    assert len(list(sequences)) == 2
    assert [row_group for _, row_group in read] == [0, 1, 0]
