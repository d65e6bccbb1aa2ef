"""Reading files that may be compressed, by their names."""

import io
import lzma
import sys
from pathlib import Path, PurePath
from typing import IO, Any

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


class XzReader(io.RawIOBase):
    """Decompresses all streams of an .xz file. `lzma.open` takes a damaged stream for the end of the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self.begun = False

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file, too."""
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Decompress into a buffer and return the number of bytes; 0 at the end.

        Raises:
            lzma.LZMAError: a stream is damaged.
            EOFError: the last stream is truncated.
        """
        while True:
            data = b""
            if self.decompressor.eof:
                data, self.begun = self.decompressor.unused_data, False
                self.decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            if not data and self.decompressor.needs_input:
                data = self.file.read(1 << 16)
                if not data and self.begun:
                    raise EOFError("it ends within a stream")
                if not data:
                    return 0
            if not self.begun:
                data = data.lstrip(b"\0")  # padding between streams
            if data or self.begun:
                self.begun = True
                found = self.decompressor.decompress(data, len(buffer))
                if found:
                    buffer[: len(found)] = found
                    return len(found)


def open_stream(path: Location) -> io.BufferedReader:
    """Open a file for buffered binary reading and decompress it according to its name."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression == "xz":
        return io.BufferedReader(XzReader(path.open("rb")), 1 << 20)
    if compression == "zstd":
        options = {int(zstd.DecompressionParameter.window_log_max): WINDOW_LOG}
        return io.BufferedReader(zstd.open(openable(path), options=options), 1 << 20)
    return io.BufferedReader(pa.input_stream(openable(path), compression=compression), 1 << 20)
