"""Other people's tools read a set: equal values from all of them."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest

from weighted_mtp.schemas.shard_set.card import code, describe_set
from weighted_mtp.schemas.shard_set.shard_set import CARD, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.storage.files import DATA

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[np.nan, 1, 2.125], [np.nan, 0.5], [np.nan, 4, 9.25, 0.001953125]]
EXCESS = [[np.nan, -1, 0], [np.nan, 3.5], [np.nan, 0, 0.25, 0.125]]


@pytest.fixture
def scored(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    columns = {"reward": [0.5, -1.0, 3.0], "group": ["a", "b", "a"]}
    return make_shard_set(SEQUENCES, {"loss_a": LOSSES, "excess_loss": EXCESS}, sequence_columns=columns)


def assert_same(rows: dict[str, list]) -> None:
    """The columns of a reader, as Python lists, hold the values of the set."""
    assert [list(ids) for ids in rows["input_ids"]] == SEQUENCES
    assert list(rows["document_id"]) == ["doc-0", "doc-1", "doc-2"]
    assert list(rows["reward"]) == [0.5, -1.0, 3.0]
    assert list(rows["group"]) == ["a", "b", "a"]
    for name, expected in (("loss_a", LOSSES), ("excess_loss", EXCESS)):
        for found, row in zip(rows[name], expected, strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float64), row)


def test_this_project(scored: ShardSet) -> None:
    values = np.concatenate([flat_values(scored.read(shard)["loss_a"]) for shard in (0, 1)])
    np.testing.assert_array_equal(values, np.concatenate(LOSSES))


def test_datasets_reads_the_directory(scored: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    loaded = datasets.load_dataset(str(scored.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert_same(loaded.to_dict())


def test_polars_reads_the_shards(scored: ShardSet) -> None:
    frame = pl.scan_parquet(f"{scored.path}/{DATA}/*.parquet").collect()
    assert_same(frame.to_dict(as_series=False))


IDS = ["doc-0", "doc-0", "doc-1"]
MEANS = {"doc-0": (-1 + 0 + 3.5) / 3, "doc-1": (0 + 0.25 + 0.125) / 3}
"""Of `EXCESS`, where the first document has two sequences."""


@pytest.fixture
def in_parts(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    return make_shard_set(SEQUENCES, {"excess_loss": EXCESS}, "parts", document_starts=[0, 3, 0], document_ids=IDS)


def test_the_mean_by_document_in_polars(in_parts: ShardSet) -> None:
    files = f"{in_parts.path}/{DATA}/*.parquet"
    scores = pl.scan_parquet(files).select("document_id", "excess_loss").explode("excess_loss")
    means = scores.filter(pl.col("excess_loss").is_not_nan()).group_by("document_id").agg(pl.mean("excess_loss"))
    assert dict(means.collect().iter_rows()) == pytest.approx(MEANS)


@pytest.mark.slow
def test_the_mean_by_document_in_duckdb(in_parts: ShardSet) -> None:
    import duckdb

    means = duckdb.sql(
        "SELECT document_id, avg(x) FILTER (NOT isnan(x)) FROM "
        f"(SELECT document_id, unnest(excess_loss) AS x FROM '{in_parts.path}/{DATA}/*.parquet') GROUP BY document_id"
    )
    assert dict(means.fetchall()) == pytest.approx(MEANS)


def test_pandas_reads_the_directory_of_shards(scored: ShardSet) -> None:
    assert_same(pd.read_parquet(scored.path / DATA).to_dict("list"))


@pytest.mark.slow
def test_duckdb_reads_the_shards(scored: ShardSet) -> None:
    import duckdb

    files = f"'{scored.path}/{DATA}/*.parquet'"
    rows = duckdb.sql(f"SELECT * FROM {files} ORDER BY document_id").fetchall()
    names = [field.name for field in scored.reader.schema]
    assert_same({name: [row[index] for row in rows] for index, name in enumerate(names)})


def test_the_card_names_columns_but_no_directories(scored: ShardSet) -> None:
    card = (scored.path / CARD).read_text()
    assert card.startswith("---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n")
    for name in ("loss_a", "excess_loss", "reward", "group", "input_ids"):
        assert f"| `{name}` |" in card
    corpus = scored.manifest.corpus.model_copy(update={"input": "/home/me/private/texts.jsonl"})
    column = scored.manifest.columns["loss_a"]
    origin = column.origin.model_copy(update={"model": "../private/model"})
    columns = {"loss_a": column.model_copy(update={"origin": origin})}
    card = describe_set(scored.manifest.model_copy(update={"corpus": corpus, "columns": columns}))
    assert "private" not in card
    assert "`texts.jsonl`" in card
    assert "`model, full context" in card


def test_foreign_text_stays_text_in_the_card() -> None:
    assert code("a`b|c\n<d>\x1b[31m") == "`a b c <d> [31m`"
