"""Files decompressed by their names."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from upath import UPath

from weighted_mtp.schemas.storage.compression import DAMAGE, data_suffix, open_stream

CONTENT = b"one\ntwo\n" * 1000


def zstd_frame(content: bytes, window_log: int) -> bytes:
    """A zstd frame of one raw block (RFC 8878), which asks for a window of `2**window_log` bytes."""
    block = len(content) << 3 | 1
    return b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3]) + block.to_bytes(3, "little") + content


COMPRESSED = {
    "a.txt": CONTENT,
    "a.txt.gz": gzip.compress(CONTENT[:8]) + gzip.compress(CONTENT[8:]),
    "a.txt.bz2": bz2.compress(CONTENT),
    "a.TXT.XZ": lzma.compress(CONTENT),
    "a.txt.zst": pa.compress(CONTENT, "zstd", asbytes=True),
    "a.txt.ZSTD": zstd_frame(CONTENT[:8], 10) + zstd_frame(CONTENT[8:], 31),
}


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("store", ["disk", "memory"])
def test_content_by_lines(tmp_path: Path, name: str, store: str) -> None:
    path = UPath(tmp_path if store == "disk" else f"memory://{tmp_path}") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESSED[name])
    with open_stream(path) as stream:
        assert stream.readline(2) == b"on"
        assert b"on" + stream.read() == CONTENT


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JSONL.gz", ".jsonl"), ("a.csv.zstd", ".csv"), ("a.b.csv", ".csv"), ("a.gz", ""), ("a.gz.jsonl", ".jsonl")],
)
def test_the_suffix_of_the_data(name: str, suffix: str) -> None:
    assert data_suffix(UPath(name)) == suffix


def test_damaged_zstd_is_found(tmp_path: Path) -> None:
    frame = zstd_frame(CONTENT, 31)
    for content in (b"", frame[:-1], frame + frame[:20], frame + CONTENT, zstd_frame(CONTENT, 41)):
        (tmp_path / "a.zst").write_bytes(content)
        with pytest.raises(DAMAGE), open_stream(UPath(tmp_path / "a.zst")) as stream:
            stream.read()


ONE, MANY = lzma.compress(b"one\n"), lzma.compress(CONTENT)


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    with open_stream(UPath(path)) as stream:
        return stream.read()


def test_all_streams_of_an_xz_file_are_read(tmp_path: Path) -> None:
    assert read(tmp_path / "a.xz", ONE + MANY) == b"one\n" + CONTENT
    assert read(tmp_path / "a.xz", ONE + bytes(8) + MANY + bytes(4)) == b"one\n" + CONTENT, "padded"


@pytest.mark.parametrize(
    "content",
    [ONE + MANY[:3] + b"x" + MANY[4:], ONE + b"something else", ONE + MANY[:40], MANY[:-1], MANY[:20]],
    ids=["damaged", "garbage", "truncated", "end", "start"],
)
def test_damage_after_the_first_xz_stream_is_found(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DAMAGE):
        read(tmp_path / "a.xz", content)
