"""Finding and opening score files."""

from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports.score_files import find_score_files, open_score_file


def test_a_file_counts_once_and_hidden_files_do_not(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.PARQUET", ".c.jsonl", "_d.jsonl", "e.txt"):
        (tmp_path / name).touch()
    found = find_score_files([str(tmp_path), f"{tmp_path}/*.jsonl"])
    assert [file.name for file in found] == ["a.PARQUET", "b.jsonl", "_d.jsonl"]


def test_json_lines_may_be_compressed_and_parquet_may_not(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.JSON.ZST", "c.ndjson.bz2", "d.jsonl.xz", "e.parquet.gz", "f.gz"):
        (tmp_path / name).touch()
    assert [file.name for file in find_score_files([str(tmp_path)])] == ["a.jsonl.gz", "b.JSON.ZST", "c.ndjson.bz2"]
    for name in ("d.jsonl.xz", "e.parquet.gz", "f.gz"):
        with pytest.raises(UserError, match=f"{name}: is no Parquet or JSON Lines file by its name"):
            find_score_files([str(tmp_path / name)])


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(it has no rows\)"):
        open_score_file(UPath(tmp_path / "a.jsonl"))
