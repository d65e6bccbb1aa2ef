"""Shard sets with given columns, and the weights of their tokens."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.weighting import make_weighting

NAN = math.nan
MakeSet = Callable[..., ShardSet]


def scored(
    make_shard_set: MakeSet, name: str = "set", starts: list[int] | None = None, **columns: object
) -> ZippedSets:
    """A set with these columns: lists of lists are token scores, flat lists are sequence values."""
    scores = {key: rows for key, rows in columns.items() if isinstance(rows[0], list)}
    carried = {key: values for key, values in columns.items() if key not in scores}
    lengths = map(len, next(iter(scores.values()))) if scores else [3] * len(next(iter(carried.values())))
    sequences = [[1] * length for length in lengths]
    return ZippedSets((make_shard_set(sequences, scores, name, sequence_columns=carried, document_starts=starts),))


def weights_of(shards: ZippedSets, live_column: str | None = None, **config: object) -> list[list[float]]:
    """The weights of each sequence."""
    weighting = make_weighting(WeightsConfig(**config), shards, live_column)
    found = []
    for number, shard in enumerate(shards.first.manifest.shards):
        for row_group in range(shard.row_groups):
            table = shards.read(number, weighting.columns, row_group)
            weights = weighting.weigh(table, np.random.default_rng(number))
            assert weights.dtype == np.float32
            ends = np.cumsum(list_lengths(table["input_ids"]))
            found += [part.tolist() for part in np.split(weights, ends[:-1])]
    return found


def assert_weights(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for own, row in zip(found, expected, strict=True):
        assert own == pytest.approx(row, rel=1e-5, abs=1e-7)


def rows_of(weights: list[list[list[float]]], positions: list[list[int]]) -> Rows:
    """Packed rows with (B, L, components) values."""
    nothing = np.zeros(len(positions), dtype=np.int64)
    values = np.array(weights, np.float32)
    return Rows(np.array(positions, np.int32), np.array(positions, np.int32), values, nothing, nothing, nothing)
