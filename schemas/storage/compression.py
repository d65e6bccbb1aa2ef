"""Reading files that may be compressed, by their names."""

import io
import lzma
import sys
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from weighted_mtp.schemas.storage.locations import Location

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
"""Compression by the suffix of a file name."""
WINDOW_LOG = 31
"""Largest zstd window, as a power of 2. Arrow's decoder stops at 27, but `zstd --ultra --long=31` writes up to 31."""
DAMAGE = (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zstd.ZstdError, pa.ArrowException)
"""What reading a damaged file raises."""


def data_suffix(path: PurePath | Location) -> str:
    """The suffix of a file name in lower case, without the compression: `.jsonl` for `a.JSONL.gz`."""
    name = PurePath(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix


def openable(path: Location) -> Any:
    """Argument for decoders: a local file name, or an open remote file, which they close."""
    return str(path) if isinstance(path, Path) else path.open("rb")


def open_stream(path: Location) -> io.BufferedReader | lzma.LZMAFile:
    """Open a file for buffered binary reading and decompress it according to its name."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression == "xz":
        return lzma.open(openable(path))
    if compression == "zstd":
        options = {int(zstd.DecompressionParameter.window_log_max): WINDOW_LOG}
        return io.BufferedReader(zstd.open(openable(path), options=options), 1 << 20)
    return io.BufferedReader(pa.input_stream(openable(path), compression=compression), 1 << 20)
