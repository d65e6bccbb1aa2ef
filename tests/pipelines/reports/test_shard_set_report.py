"""Columns in the report of a set."""

from collections.abc import Callable

import numpy as np
import pytest

from weighted_mtp.pipelines.reports.shard_set_report import default_column
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

MakeShardSet = Callable[..., ShardSet]
SEQUENCES = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]


def scores_of(sequences: list[list[int]], seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [[np.nan, *rng.normal(size=len(ids) - 1)] for ids in sequences]


def test_the_default_column_is_the_first_contrast(make_shard_set: MakeShardSet) -> None:
    losses, excess = scores_of(SEQUENCES, 1), scores_of(SEQUENCES)
    both = make_shard_set(SEQUENCES, {"loss_reference": losses, "excess_loss": excess}, "both")
    assert default_column(both.manifest) == "excess_loss"
    assert default_column(make_shard_set(SEQUENCES, {"loss_reference": losses}, "one").manifest) == "loss_reference"
    assert default_column(make_shard_set(SEQUENCES, name="none").manifest) is None


def test_bytes_per_token_are_those_of_the_files(make_shard_set: MakeShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set = make_shard_set(SEQUENCES, {"excess_loss": scores_of(SEQUENCES)})
    sizes = shard_set.bytes_per_token()
    assert set(sizes) == {"document_id", "start", "input_ids", "excess_loss"}
    assert all(size > 0 for size in sizes.values())
    assert sum(sizes.values()) < shard_set.manifest.bytes / shard_set.manifest.tokens
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shard_set.SAMPLED_FOOTERS", 1)
    shard_set.file(-1).path.unlink()
    first = shard_set.manifest.shards[0]
    assert len(shard_set.manifest.shards) > 1
    assert 0 < sum(shard_set.bytes_per_token().values()) < first.bytes / first.tokens
