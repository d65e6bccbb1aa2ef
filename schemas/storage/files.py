"""Atomic writes: a file is either complete under its final name or absent. Checksums and JSON of such files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.locations import Location, list_files

MANIFEST = "manifest.json"
"""The file that makes a directory a shard set."""

DATA = "data"
"""Directory of the shards inside a shard set."""

TOKENIZER = "tokenizer"
"""Directory of the corpus's tokenizer inside a shard set."""

PROGRESS = ".progress"
"""Directory of an unfinished run inside its output. It is removed once the manifest is written."""

LOCK = ".lock"
"""Lock file of an output directory: locked on a disk, renewed in a store (see `schemas.storage.locks`)."""


@contextmanager
def atomic_write(path: Location) -> Iterator[BinaryIO]:
    """Yield a binary file, for writing and reading, that is stored as `path` only if the block succeeds.

    On a disk the data is fsynced before the rename, and the directory after it, so a crash leaves the old file or the
    new one. An object store receives the finished file in one upload, which is atomic.
    """
    try:
        if not isinstance(path, Path):
            with tempfile.TemporaryDirectory() as scratch, open(os.path.join(scratch, path.name), "w+b") as file:
                yield file
                file.flush()
                path.fs.put_file(file.name, path.path)
            return
        # Process ids are not unique across machines that share a disk.
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with open(temporary, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)
    except OSError as error:
        if error.errno is not None:  # full-disk errors do not name the file
            error.filename = error.filename or str(path)
        raise


def move(source: Location, target: Location) -> None:
    """Rename a complete file within its file system, replacing any file of that name. Durable on return."""
    if isinstance(source, Path) and isinstance(target, Path):
        source.replace(target)
        fsync(target.parent)
    else:
        assert isinstance(source, UPath)
        assert isinstance(target, UPath)
        source.fs.cp_file(source.path, target.path)  # `mv` would look for directories, with more requests
        source.fs.rm_file(source.path)


def write_text(path: Location, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def copy_files(source: Location, target: Location) -> None:
    """Copy the small files directly in `source` into the directory `target`, which is created if missing."""
    target.mkdir(parents=True, exist_ok=True)
    for name in list_files(source):
        with atomic_write(target / name) as file:
            file.write((source / name).read_bytes())


def fsync(path: Path) -> None:
    """Flush the content of a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Location) -> None:
    """Flush all files below `directory`, and their names, to disk. Object stores need no flush."""
    if not isinstance(directory, Path):
        return
    for path in sorted(directory.rglob("*"), reverse=True):
        fsync(path)
    fsync(directory)


def sha256_file(path: Location) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        # Remote files have the required `readinto`, but their type does not declare it.
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_json_file(path: Location) -> Any:
    """Read a JSON file written by this project.

    Raises:
        UserError: it cannot be parsed.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or remove its directory and start again") from error


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Sorted dotted names of the leaves that differ between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        leaves = [leaf for key in keys for leaf in differences(before.get(key), after.get(key), f"{name}.{key}")]
        return sorted(leaves)
    return [] if before == after else [name.removeprefix(".") or "everything"]
