"""Bounds of the memory that score rows take."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shards import MOST_TEXT_BYTES
from weighted_mtp.scoring.imports import score_rows
from weighted_mtp.scoring.imports.score_files import ScoreFile, open_score_file
from weighted_mtp.scoring.imports.score_rows import read_rows
from weighted_mtp.scoring.imports.sources import Kind


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScoreFile:
    """Four rows of a list of two numbers and a label of 300 bytes."""
    monkeypatch.setattr(score_rows, "EXCESS_NUMBERS", 3)
    rows = [{"document_id": f"d{n}", "x": [n, n], "group": "a" * 300} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_score_file(UPath(tmp_path / "a.jsonl"))


def test_reading_stops_at_far_too_many_numbers(file: ScoreFile) -> None:
    assert len(read_rows([file], {"x": "score"}, 3).keys) == 4
    with pytest.raises(UserError, match=r"a\.jsonl: 'x' is much larger than the set allows; check"):
        read_rows([file], {"x": "score"}, 2)


def test_reading_stops_at_far_too_many_rows(file: ScoreFile) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: has many more rows than the set allows; check"):
        read_rows([file], {"group": "label"}, 0)


def test_reading_stops_at_far_too_long_labels_and_ids(file: ScoreFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_rows([file], {"group": "label"}, 8).keys) == 4
    monkeypatch.setattr(score_rows, "TEXT_BYTES", 60)
    with pytest.raises(UserError, match=r"a\.jsonl: 'group' is much larger"):
        read_rows([file], {"group": "label"}, 8)
    monkeypatch.setattr(score_rows, "TEXT_BYTES", 1)
    with pytest.raises(UserError, match=r"a\.jsonl: 'document_id' is much larger"):
        read_rows([file], {"group": "label"}, 8)


def test_ids_and_labels_have_a_largest_size(tmp_path: Path) -> None:
    rows = [{"document_id": "a", "group": "é" * (MOST_TEXT_BYTES // 2) + tail} for tail in ("", "a")]
    for row, name in zip(rows, ("fits", "long"), strict=True):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    read_rows([open_score_file(UPath(tmp_path / "fits.parquet"))], {"group": "label"}, 1)
    with pytest.raises(UserError, match=r"long\.parquet: row 1: 'group' is longer than 65,536 bytes; shorten it"):
        read_rows([open_score_file(UPath(tmp_path / "long.parquet"))], {"group": "label"}, 1)


LONG = "a" * 1_000_000


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        (lambda: pa.array([[0.0] * 5_000_000]), "score", "'x' is much larger than the set allows"),
        (lambda: pa.array([LONG * 140]), "label", "'x' is much larger than the set allows"),
        (
            lambda: pa.DictionaryArray.from_arrays([0] * 10_000, [LONG]),
            "label",
            "row 1: 'x' is longer than 65,536 bytes",
        ),
    ],
    ids=["list", "string", "dictionary"],
)
def test_large_values_in_a_small_parquet_file_take_little_memory(
    tmp_path: Path, column: Callable[[], pa.Array], kind: Kind, message: str
) -> None:
    path, values = tmp_path / "a.parquet", column()
    table = pa.table({"document_id": list(map(str, range(len(values)))), "x": values})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 24)
    assert path.stat().st_size < 100_000
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)  # counts from zero
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(UserError, match=message):
            read_rows([open_score_file(UPath(path))], {"x": kind}, 100)
    finally:
        pa.set_memory_pool(default)
    assert pool.max_memory() < 10_000_000
