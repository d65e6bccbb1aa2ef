"""Files that are either complete under their final name or not there at all."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from schemas.errors import UserError

MANIFEST = "manifest.json"
"""The file that makes a directory a shard set."""

TOKENIZER = "tokenizer"
"""Folder of a shard set that holds the corpus's tokenizer."""

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
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under `path`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def fsync(path: Path) -> None:
    """Make the content of a file durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Make all files below `directory`, and their names, durable."""
    for path in sorted(directory.rglob("*"), reverse=True):
        fsync(path)
    fsync(directory)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
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


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Hold the directory `output`, made if need be, for this process alone; an empty one that it made is removed again.

    Raises:
        UserError: another process holds it, it is a file, or it lies inside a shard set.
    """
    if inside := next(filter(_is_shard_set, output.resolve().parents), None):
        raise UserError(f"--output {output}: lies inside the shard set {inside}; choose a directory outside it")
    new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--output {output}: is, or lies below, a file; choose another --output") from error
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output}: another process is writing it; wait or choose another") from error
        yield
    finally:
        os.close(descriptor)
        if new:
            with suppress(OSError):
                output.rmdir()


def _is_shard_set(path: Path) -> bool:
    return (path / MANIFEST).exists() and (path / TOKENIZER).is_dir()


def claim_output(output: Path, request: str) -> bool:
    """Claim `output` for the run described by the JSON text `request`; return True if an earlier start is continued.

    An empty directory is claimed by writing `.progress/request.json`. A claim under which nothing was done gives way.

    Raises:
        UserError: `output` holds anything else, or a run with another request; what differs is named.
    """
    progress = output / PROGRESS
    claim = progress / "request.json"
    if claim.exists():
        changed = differences(read_json(claim), json.loads(request))
        if not changed:
            return True
        if any(progress.glob("*.parquet")):
            raise UserError(
                f"{output}: holds an unfinished run with other settings ({', '.join(changed)}); "
                "repeat that command, remove the directory, or choose another --output"
            )
    elif any(path.name != PROGRESS for path in output.iterdir()):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")
    progress.mkdir(exist_ok=True)
    write_text(claim, request)
    return False


def clear_directory(directory: Path) -> None:
    """Remove everything in `directory`, but not itself."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def release_output(output: Path) -> None:
    """Remove the traces of a run that has written its manifest, and files that killed runs left half-written."""
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    for leftover in output.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
