"""Files that are either complete under their final name or not there at all."""

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
from weighted_mtp.schemas.storage.locations import Location, list_files, remove_tree

MANIFEST = "manifest.json"
"""The file that makes a directory a shard set."""

TOKENIZER = "tokenizer"
"""Folder of a shard set that holds the corpus's tokenizer."""

PROGRESS = ".progress"
"""Folder inside an output directory that holds a run in progress; it is gone once the manifest is written."""

CLAIM = "request.json"
"""File in there that says what the run was asked for."""

LOCK = ".lock"
"""Keeps a second run out of an output: a locked file on a disk, an object in a store (see `schemas.storage.locks`)."""


@contextmanager
def atomic_write(path: Location) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` only if the block ends without an exception.

    On a disk the data is fsynced before the rename, and the directory after it, so a crash leaves the old file or the
    new one. An object store gets the finished file in one upload, which appears complete or not at all.
    """
    try:
        if not isinstance(path, Path):
            with tempfile.TemporaryDirectory() as scratch, open(os.path.join(scratch, path.name), "wb") as file:
                yield file
                file.flush()
                path.fs.put_file(file.name, path.path)
            return
        # Of two machines that share a disk, processes may have the same number.
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)
    except OSError as error:
        if error.errno is not None:  # a full disk does not say which file it was
            error.filename = error.filename or str(path)
        raise


def move(source: Location, target: Location) -> None:
    """Give a complete file another name in the same file system, in place of what had it; durable on return."""
    if isinstance(source, Path) and isinstance(target, Path):
        source.replace(target)
        fsync(target.parent)
    else:
        assert isinstance(source, UPath)
        assert isinstance(target, UPath)
        source.fs.cp_file(source.path, target.path)  # `mv` would look for folders of these names, with more requests
        source.fs.rm_file(source.path)


def write_text(path: Location, text: str) -> None:
    """Write `text` as UTF-8 under `path`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def copy_files(source: Location, target: Location) -> None:
    """Copy the files directly in `source`, which are small, into the directory `target`, made if need be."""
    target.mkdir(parents=True, exist_ok=True)
    for name in list_files(source):
        with atomic_write(target / name) as file:
            file.write((source / name).read_bytes())


def fsync(path: Path) -> None:
    """Make the content of a file durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Location) -> None:
    """Make all files below `directory`, and their names, durable; what an object store has is durable."""
    if not isinstance(directory, Path):
        return
    for path in sorted(directory.rglob("*"), reverse=True):
        fsync(path)
    fsync(directory)


def sha256_file(path: Location) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        # Files of stores have the `readinto` that is needed, and no type that says so.
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_json(path: Location) -> Any:
    """Read a JSON file that this project wrote.

    Raises:
        UserError: it cannot be parsed.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or remove its directory and start again") from error


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Dotted names, sorted, of the leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        leaves = [leaf for key in keys for leaf in differences(before.get(key), after.get(key), f"{name}.{key}")]
        return sorted(leaves)
    return [] if before == after else [name.removeprefix(".") or "everything"]


def claim_output(output: Location, request: str) -> bool:
    """Claim `output` for the run described by the JSON text `request`; return True if an earlier start is continued.

    An empty directory is claimed by writing `.progress/request.json`. A claim under which nothing was done gives way.

    Raises:
        UserError: `output` holds anything else, or a run with another request; what differs is named.
    """
    if check_claim(output, request):
        return True
    (output / PROGRESS).mkdir(exist_ok=True)
    write_text(output / PROGRESS / CLAIM, request)
    return False


def check_claim(output: Location, request: str) -> bool:
    """What `claim_output` does before it writes anything."""
    progress = output / PROGRESS
    if (progress / CLAIM).exists():
        changed = differences(read_json(progress / CLAIM), json.loads(request))
        if not changed:
            return True
        if any(progress.glob("*.parquet")):
            raise UserError(
                f"{output}: holds an unfinished run with other settings ({', '.join(changed)}); "
                "repeat that command, remove the directory, or choose another --output"
            )
    elif output.exists() and any(path.name not in (PROGRESS, LOCK) for path in output.iterdir()):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")
    return False


def clear_directory(directory: Location) -> None:
    """Remove everything in `directory` but a lock, and not itself; an absent one is no error."""
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def release_output(output: Location) -> None:
    """Remove the traces of a run that has written its manifest, and files that killed runs left half-written."""
    remove_tree(output / PROGRESS)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
