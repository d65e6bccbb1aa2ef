"""Files that are either complete under their final name or not there at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from schemas.errors import UserError

PROGRESS = ".progress"
"""Folder inside an output directory that holds a run in progress; it is gone once the manifest is written."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` only if the block ends without an exception.

    The data is fsynced before the rename, and the directory after it, so a crash leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under `path`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def fsync_directory(path: Path) -> None:
    """Make renames inside the directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim_output(output: Path, request: str) -> bool:
    """Claim `output` for the run described by the JSON text `request`; return True if an earlier start is continued.

    An absent or empty directory is claimed by writing `.progress/request.json`.

    Raises:
        UserError: `output` holds anything else, or a run with another request.
    """
    claim = output / PROGRESS / "request.json"
    if claim.exists():
        if claim.read_text() != request:
            raise UserError(
                f"{output}: holds an unfinished run with other settings (see {claim}); "
                "repeat that command, remove the directory, or choose another --output"
            )
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")
    claim.parent.mkdir(parents=True, exist_ok=True)
    write_text(claim, request)
    return False


def release_output(output: Path) -> None:
    """Remove the traces of a run that has written its manifest, and files that killed runs left half-written."""
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
