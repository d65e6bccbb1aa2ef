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
from weighted_mtp.scoring.imports.json_lines import Lines, nesting, parse_lines, read_lines
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


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd, ".zstd": zstd}


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


def test_a_byte_order_mark_and_line_ends_of_windows_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(ROWS))
    assert np.array_equal(read(tmp_path / "a.jsonl").lists["x"].values, VALUES)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + ROWS[0])
    assert read(tmp_path / "a.jsonl").keys["row"].to_list() == [1]


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


def test_blank_lines_without_end_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MOST_BLANK_BYTES", len(ROWS[0]))
    content = b"".join(row + b"\n" * len(row) for row in ROWS)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(content))
    np.testing.assert_array_equal(read(tmp_path / "a.jsonl.zst").lists["x"].values, VALUES)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(content + b"\n" * 1000))
    with pytest.raises(UserError, match=r"row \d+: more than \d+ bytes of blank lines"):
        read(tmp_path / "a.jsonl.zst")


TYPES = pa.schema([("document_id", pa.string()), ("start", pa.int64()), ("x", pa.list_(pa.float64()))])


@pytest.mark.parametrize("position", [0, 4, 9])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (ROWS[0] + b"garbage", "not one object in each line"),
        (ROWS[0] + ROWS[1], "not one object in each line"),
        (b'{"document_id": "a", "x": [1],}', "JSON parse error: Missing a name for object member"),
        (b'{"document_id": "a", "x": [1, 2', "JSON parse error: Missing a comma"),
        (b'{"document_id": "a", "start": 1.5}', "Failed to convert JSON to int64"),
        (b'{"document_id": "\xff", "x": [1]}', "is not in UTF-8"),
        (b'{"document_id": "a", "x": ' + b"[" * 100_000, "lists and objects are nested more than 256 deep"),
        (b'{"a": ' * 100_000, "lists and objects are nested more than 256 deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "lists and objects are nested more than 256 deep"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, reason: str, position: int) -> None:
    lines = [row + b"\n" for row in (*ROWS[:position], line, *ROWS[position:])]
    with pytest.raises(ValueError, match=f"row {2 * position + 1}: {reason}"):
        parse_lines(Lines(np.arange(0, 20, 2), lines), TYPES, "error")


def test_nesting_over_several_lines() -> None:
    with pytest.raises(ValueError, match="row 1: JSON parse error"):
        parse_lines(Lines(np.arange(1000), [b'{"a": ' * 200 + b"\n"] * 1000))


def test_brackets_in_texts_are_not_nested() -> None:
    text = "[{" * 1000 + '"\\' + "[" * 1000
    content = json.dumps({"document_id": text, "x": [1, 2], text: 'a\\"'}).encode()
    assert nesting(content)[0].max(initial=0) == 2
    assert parse_lines(Lines(np.arange(2), [content + b"\n"] * 2))["document_id"].to_pylist() == [text, text]


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", 0), (b"1", 0), (b"[][]", 1), (b'{"[": [{}, []]}', 3), (b'{"\\"[": "\\\\"}', 1)]
)
def test_depth(content: bytes, expected: int) -> None:
    assert nesting(content)[0].max(initial=0) == expected


@pytest.mark.parametrize("name", ["7.0", "1" * 30])
def test_ids_that_are_numbers_but_no_integers_of_64_bits(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"document_id": {name}, "x": [1]}}')
    with pytest.raises(UserError, match=r"a\.jsonl: 'document_id' should be a string; it is double"):
        read(tmp_path / "a.jsonl")
