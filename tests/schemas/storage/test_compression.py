"""Files decompressed by their names."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.schemas.storage.compression import data_suffix, open_stream

CONTENT = b"one\ntwo\n" * 1000


COMPRESSED = {
    "a.txt": CONTENT,
    "a.txt.gz": gzip.compress(CONTENT[:8]) + gzip.compress(CONTENT[8:]),
    "a.txt.bz2": bz2.compress(CONTENT),
    "a.TXT.XZ": lzma.compress(CONTENT),
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
    ("name", "suffix"), [("a.JSONL.gz", ".jsonl"), ("a.b.csv", ".csv"), ("a.gz", ""), ("a.gz.jsonl", ".jsonl")]
)
def test_the_suffix_of_the_data(name: str, suffix: str) -> None:
    assert data_suffix(UPath(name)) == suffix
