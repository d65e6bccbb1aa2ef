"""Reading files that may be compressed, by their names."""

import io
import lzma
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from weighted_mtp.schemas.storage.locations import Location

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def data_suffix(path: PurePath | Location) -> str:
    """The suffix of a file name in lower case, without the compression: `.jsonl` for `a.JSONL.gz`."""
    name = PurePath(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix


def openable(path: Location) -> Any:
    """Argument for pyarrow and lzma: a local file name, or an open remote file, which they close."""
    return str(path) if isinstance(path, Path) else path.open("rb")


def open_stream(path: Location) -> io.BufferedReader | lzma.LZMAFile:
    """Open a file for buffered binary reading and decompress it according to its name."""
    if path.suffix.lower() == ".xz":
        return lzma.open(openable(path))
    compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix.lower())
    return io.BufferedReader(pa.input_stream(openable(path), compression=compression), 1 << 20)
