"""Bounds of the memory that score rows take."""

import json
from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports import score_rows
from weighted_mtp.scoring.imports.score_files import ScoreFile, open_score_file
from weighted_mtp.scoring.imports.score_rows import read_rows


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
