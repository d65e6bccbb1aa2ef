"""Score files: parts of JSON Lines, and bounds."""

import json
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports import score_files
from weighted_mtp.scoring.imports.score_files import choose_columns, find_score_files, read_scores, read_types


def write_rows(path: Path, count: int) -> UPath:
    path.write_text("".join(json.dumps({"document_id": f"d{n}", "x": [n, n + 0.5]}) + "\n" for n in range(count)))
    return UPath(path)


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "BATCH_BYTES", 70)


@pytest.mark.usefixtures("_small_parts")
def test_rows_are_numbered_across_parts(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", 9)
    types = [read_types(file)]
    kinds = choose_columns(types, ())
    rows = read_scores(types, kinds, 18)
    np.testing.assert_array_equal(rows.lists["x"].values, np.array([[n, n + 0.5] for n in range(9)]).ravel())
    assert rows.lists["x"].first.tolist() == list(range(0, 18, 2))
    assert rows.keys["row"].to_list() == list(range(9))
    with file.open("a") as more:
        more.write('{"document_id": "d9", "x": [1, "a"]}\n')
    with pytest.raises(UserError, match=r"row 10: JSON parse error: Column\(/x/\[\]\) changed"):
        read_scores(types, kinds, 18)


def test_reading_stops_at_far_too_many_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "EXCESS_NUMBERS", 3)
    types = [read_types(write_rows(tmp_path / "a.jsonl", 4))]
    assert len(read_scores(types, {"x": "score"}, 3).keys) == 4
    with pytest.raises(UserError, match="many more numbers than the set has tokens"):
        read_scores(types, {"x": "score"}, 2)


def test_a_file_counts_once_and_hidden_files_do_not(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.PARQUET", ".c.jsonl", "_d.jsonl", "e.txt"):
        (tmp_path / name).touch()
    found = find_score_files([str(tmp_path), f"{tmp_path}/*.jsonl"])
    assert [file.name for file in found] == ["a.PARQUET", "b.jsonl", "_d.jsonl"]
