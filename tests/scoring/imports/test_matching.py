"""Score rows and the sequences that they belong to."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.imports.matching import list_sequences, match_rows
from weighted_mtp.scoring.imports.score_files import JsonFile
from weighted_mtp.scoring.imports.score_rows import Lists, ScoreRows


def score_rows(documents: list[str], lengths: list[int]) -> ScoreRows:
    keys = {"document_id": documents, "start": [None] * len(documents), "source": 0, "row": range(len(documents))}
    counts = np.array(lengths)
    lists = Lists(np.zeros(counts.sum(), np.float16), np.cumsum(counts) - counts, counts)
    frame = pl.DataFrame(keys, schema_overrides={"start": pl.Int64, "source": pl.Int64})
    return ScoreRows([JsonFile("a.jsonl", {}, UPath("a.jsonl"))], frame, {"mine": lists}, {}, {})


def test_sequences_are_those_of_the_shards_in_order(make_shard_set: Callable[..., ShardSet]) -> None:
    source = make_shard_set([[1, 2], [3], [4, 5, 6]], document_starts=[0, 5, 0])
    assert list_sequences(source).rows() == [("doc-0", 0, 2), ("doc-1", 5, 1), ("doc-2", 0, 3)]


def test_rows_in_any_order_and_missing_ones(make_shard_set: Callable[..., ShardSet]) -> None:
    source = make_shard_set([[1, 2], [3], [4, 5, 6]], document_starts=[0, 5, 0])
    matches = match_rows(source, score_rows(["doc-2", "doc-1"], [3, 1]))
    assert matches.rows.tolist() == [-1, 1, 0]
    assert matches.offsets.tolist() == [0, 0, 0]
    assert matches.lengths.tolist() == [2, 1, 3]
    assert matches.missing == 1
    with pytest.raises(UserError, match=r"a\.jsonl: row 2 \(document 'doc-1'\): has a list of 2"):
        match_rows(source, score_rows(["doc-2", "doc-1"], [3, 2]))


def test_a_set_without_sequences_and_one_with_impossible_starts(make_shard_set: Callable[..., ShardSet]) -> None:
    source = make_shard_set([[1, 2], [3, 4]], document_starts=[0, (1 << 63) - 1])
    empty = ShardSet(source.path, source.manifest.model_copy(update={"shards": []}))
    with pytest.raises(UserError, match="has no sequences, so scores cannot be matched"):
        match_rows(empty, score_rows(["doc-0"], [2]))
    with pytest.raises(UserError, match=r"sequence of document 'doc-1' starts at token 9,223,372,036,854,775,807"):
        match_rows(source, score_rows(["doc-0"], [2]))
