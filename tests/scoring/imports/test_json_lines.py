"""Parts of JSON Lines, compressed or not, and their bounds."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports import json_lines
from weighted_mtp.scoring.imports.json_lines import read_lines
from weighted_mtp.scoring.imports.score_files import open_score_file
from weighted_mtp.scoring.imports.score_rows import ScoreRows, read_rows

ROWS = [json.dumps({"document_id": f"d{n}", "x": [n, n + 0.5]}).encode() for n in range(9)]
VALUES = np.array([[n, n + 0.5] for n in range(9)]).ravel()


def read(path: Path) -> ScoreRows:
    return read_rows([open_score_file(UPath(path))], {"x": "score"}, 18)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def test_rows_are_numbered_across_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BATCH_BYTES", 70)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(ROWS) + b"\n")
    assert len(list(read_lines(UPath(file)))) == 5
    rows = read(file)
    np.testing.assert_array_equal(rows.lists["x"].values, VALUES)
    assert rows.lists["x"].first.tolist() == list(range(0, 18, 2))
    assert rows.keys["row"].to_list() == list(range(9))
    file.write_bytes(b"\n".join(ROWS) + b'\n{"document_id": "d9", "x": [1, "a"]}\n')
    with pytest.raises(UserError, match=r"row 10: JSON parse error: Column\(/x/\[\]\) changed"):
        read(file)


def test_blank_lines_count_as_rows_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + b"\r\n \t\n".join(ROWS) + b"\n\n")
    rows = read(tmp_path / "a.jsonl")
    np.testing.assert_array_equal(rows.lists["x"].values, VALUES)
    assert rows.keys["row"].to_list() == list(range(1, 19, 2))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([ROWS[0], b"", b"", b'{"document_id": "d1", "x": 1}']))
    with pytest.raises(UserError, match="row 4: JSON parse error"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    content = COMPRESSORS[suffix](b"\n".join(ROWS))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content)
    np.testing.assert_array_equal(read(file).lists["x"].values, VALUES)
    for damaged in (content[:-20], b"\n".join(ROWS), content[:10] + b"\xff" * 9 + content[19:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: cannot be read"):
            read(file)


def long_line(size: int) -> bytes:
    return b'{"document_id": "d0", "x": [' + b"1," * (size // 2) + b"1]}"


def blank_line(size: int) -> bytes:
    return b"\n" + b" " * size


@pytest.mark.parametrize("line", [long_line, blank_line])
def test_a_line_of_any_length_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Callable[[int], bytes]
) -> None:
    monkeypatch.setattr(json_lines, "MOST_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(ROWS[0] + b"\n" + line(1 << 20)))
    with pytest.raises(UserError, match=r"cannot be read \(row [23]: has more than 1,000 bytes\)"):
        read(tmp_path / "a.jsonl.gz")
