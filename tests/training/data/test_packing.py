"""Packing keeps every token exactly once and documents whole, and says what is in a row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from weighted_mtp.training.data.packing import best_fit, pack, split_long
from weighted_mtp.training.rows import Rows


def packed(weights: list[list[float]], shards: list[int], row_length: int, seed: int | None = None) -> Rows:
    """Pack sequences of these weights; the ids count the tokens from 1."""
    lengths = np.array([len(sequence) for sequence in weights])
    ids = np.arange(1, lengths.sum() + 1, dtype=np.int32)
    flat = np.concatenate(weights).astype(np.float32)
    rng = None if seed is None else np.random.default_rng(seed)
    return pack(ids, flat, lengths, np.array(shards), row_length, rng)


SEQUENCES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=100)
@given(SEQUENCES, st.integers(2, 25), st.none() | st.integers(0, 9))
def test_every_token_once_in_order_and_documents_apart(lengths: list[int], row_length: int, seed: int | None) -> None:
    total = sum(lengths)
    tokens = np.split(np.arange(1, total + 1.0), np.cumsum(lengths)[:-1])
    rows = packed(tokens, [0] * len(lengths), row_length, seed)
    ids, positions = rows.input_ids, rows.position_ids
    real = ids > 0
    np.testing.assert_array_equal(rows.tokens, real.sum(1))
    assert sorted(ids[real].tolist()) == list(range(1, total + 1))
    np.testing.assert_array_equal(ids, rows.weights)
    assert not positions[~real].any()
    # Position p > 0 continues the token before it; pieces begin where a sequence starts or was cut.
    continues = positions[:, 1:] > 0
    np.testing.assert_array_equal(ids[:, 1:][continues], ids[:, :-1][continues] + 1)
    first = set(ids[real & (positions == 0)].tolist())
    starts = np.cumsum([0, *lengths[:-1]])
    cuts = {int(start) + i + 1 for start, n in zip(starts, lengths, strict=True) for i in range(0, n, row_length)}
    assert first == cuts


@settings(max_examples=100)
@given(SEQUENCES, st.integers(2, 25), st.integers(0, 9))
def test_silent_documents_and_sources_against_a_loop(lengths: list[int], row_length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [0.0, 0.0, 0.0, 1.0, -1.0]
    shards = rng.integers(0, 4, len(lengths)).tolist()
    rows = packed([rng.choice(values, n).tolist() for n in lengths], shards, row_length, seed)
    shard_of_id = np.append(-1, np.repeat(shards, lengths))
    for ids, positions, weights, silent, sources in zip(
        rows.input_ids, rows.position_ids, rows.weights, rows.silent, rows.sources, strict=True
    ):
        starts = np.flatnonzero((positions == 0) & (ids > 0)).tolist()
        targets = [
            weights[a + 1 : b][positions[a + 1 : b] > 0] for a, b in zip(starts, [*starts[1:], None], strict=True)
        ]
        assert silent == sum(bool(len(of_one)) and not of_one.any() for of_one in targets)
        assert sources.tolist() == shard_of_id[ids[starts]].tolist()


def test_random_order_only_moves_rows() -> None:
    weights = [[1.0] * n for n in (9, 3, 8, 5, 5, 7, 10, 2)]
    rows, shuffled = packed(weights, list(range(8)), 10), packed(weights, list(range(8)), 10, seed=1)
    order = [np.flatnonzero((shuffled.input_ids == row).all(1)).item() for row in rows.input_ids]
    assert order != sorted(order)
    for own, other in zip(rows, shuffled.take(np.array(order)), strict=True):
        assert [np.array(value).tolist() for value in own] == [np.array(value).tolist() for value in other]


def test_missing_scores_stay_missing() -> None:
    rows = packed([[np.nan, 0.5, np.nan]], [0], 5)
    np.testing.assert_array_equal(rows.weights, [[np.nan, 0.5, np.nan, 0, 0]])


def test_split_long_by_hand() -> None:
    starts, lengths, sequence = split_long(np.array([3, 10, 4]), 4)
    assert starts.tolist() == [0, 3, 7, 11, 13]
    assert lengths.tolist() == [3, 4, 4, 2, 4]
    assert sequence.tolist() == [0, 1, 1, 1, 2]


def test_best_fit_by_hand() -> None:
    """Rows of 10: 7, 6, 4, 3, 2 go to (7, 3), (6, 4) and (2)."""
    assert best_fit(np.array([2, 7, 3, 6, 4]), 10).tolist() == [2, 0, 0, 1, 1]


def test_web_like_lengths_waste_little() -> None:
    """A million tokens, as a block has, of which a tenth is in documents that had to be cut at 2048."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6.2, 1.0, 1500).astype(int), 1, 2048)
    row = best_fit(lengths, 2048)
    assert lengths.sum() / ((row.max() + 1) * 2048) > 0.99


def test_rows_of_more_than_a_hundred_thousand_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 4096, 400)
    rows = packed([[1.0] * n for n in lengths], [0] * 400, 1 << 17)
    assert rows.input_ids.shape == (-(-lengths.sum() // (1 << 17)), 1 << 17)
    assert rows.tokens.sum() == rows.weights.sum() == lengths.sum()
    assert sorted(rows.position_ids[rows.input_ids > 0]) == sorted(np.concatenate([np.arange(n) for n in lengths]))
