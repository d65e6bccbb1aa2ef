"""The rows of an evaluation: which tokens, in which documents."""

from collections.abc import Callable

import numpy as np
import pytest
from comparing import assert_same_rows

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data import loader as loader_module
from weighted_mtp.training.data.held_out import HeldOutRows
from weighted_mtp.training.rows import Rows

LENGTHS = np.random.default_rng(0).integers(1, 90, 60).tolist()


@pytest.fixture
def counted(make_shard_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """Three shards of two row groups or more, whose ids count the tokens modulo 250; blocks of 1000 tokens."""
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 1)
    ids = np.split(np.arange(sum(LENGTHS)) % 250, np.cumsum(LENGTHS)[:-1])
    return make_shard_set([one.tolist() for one in ids], rows_per_shard=20)


def pieces(rows: Rows) -> list[tuple[int, list[int]]]:
    """Document and ids of every piece, without padding, in the order of the documents."""
    found = []
    for ids, positions, tokens, sources in zip(
        rows.input_ids, rows.position_ids, rows.tokens, rows.sources, strict=True
    ):
        starts = np.flatnonzero(positions[:tokens] == 0)
        parts = np.split(ids[:tokens], starts[1:])
        found += [(int(source), part.tolist()) for source, part in zip(sources, parts, strict=True)]
    return sorted(found)


def test_all_tokens_with_their_documents(counted: ShardSet) -> None:
    held_out = HeldOutRows(counted, 100)
    rows = Rows.concatenate(list(held_out.batches(4)))
    expected = [ids for number in range(3) for ids in counted.read(number)["input_ids"].to_pylist()]
    assert [ids for _, ids in pieces(rows)] == expected
    assert [document for document, _ in pieces(rows)] == list(range(60))
    assert held_out.documents == 60
    assert held_out.tokens == sum(LENGTHS)
    assert rows.weights[rows.input_ids > 0].all()


@pytest.mark.parametrize("limit", [None, 1, 333, 2000, 10**6])
def test_rows_do_not_depend_on_the_batch_size(limit: int | None, counted: ShardSet) -> None:
    whole = Rows.concatenate(list(HeldOutRows(counted, 64, limit).batches(10**6)))
    for size in (1, 3, 8):
        parts = list(HeldOutRows(counted, 64, limit).batches(size))
        assert max(len(part.tokens) for part in parts) <= size
        assert_same_rows(Rows.concatenate(parts), whole)


@pytest.mark.parametrize("sequence_length", [8, 64, 100])
def test_a_limit_gives_the_first_tokens_of_the_set(sequence_length: int, counted: ShardSet) -> None:
    """Whatever the length of the rows: the first 28 documents have 1,290 tokens, and the next one 69."""
    held_out = HeldOutRows(counted, sequence_length, 1300)
    rows = Rows.concatenate(list(held_out.batches(2)))
    tokens = np.bincount([document for document, ids in pieces(rows) for _ in ids])
    assert tokens.tolist() == [*LENGTHS[:28], 10]
    assert (held_out.tokens, held_out.documents) == (1300, 29)
    last = [token for document, ids in pieces(rows) if document == 28 for token in ids]
    assert sorted(last) == [token % 250 for token in range(1290, 1300)]


def test_a_document_has_all_its_sequences_and_its_pieces(make_shard_set: Callable[..., ShardSet]) -> None:
    """The second document starts in one shard and ends in the next; the third has its name."""
    shards = make_shard_set(
        [[1], [2] * 5, [3], [4] * 2, [5] * 3],
        document_ids=["a", "b", "b", "b", "c"],
        document_starts=[0, 0, 5, 0, 0],
    )
    held_out = HeldOutRows(shards, 3)
    (rows,) = held_out.batches(9)
    assert pieces(rows) == [(0, [1]), (1, [2, 2]), (1, [2, 2, 2]), (1, [3]), (2, [4, 4]), (3, [5, 5, 5])]
    assert held_out.documents == 4


def test_a_set_without_targets_is_refused(make_shard_set: Callable[..., ShardSet]) -> None:
    with pytest.raises(UserError, match="/set: no sequence has two tokens, so there is nothing to predict"):
        HeldOutRows(make_shard_set([[1], [2]]), 8)
