"""Locks: one writer per output directory."""

import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from uuid import uuid4

from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.files import LOCK, MANIFEST, TOKENIZER
from weighted_mtp.schemas.storage.locations import Location

logger = logging.getLogger("weighted_mtp")

RENEWAL_SECONDS = 10.0
"""Interval of lock renewals in an object store. A lock not renewed for three intervals belongs to a killed run."""


@contextmanager
def exclusive(output: Location) -> Iterator[Callable[[], bool]]:
    """Lock the directory `output` for this process. Creates it if missing and removes it again if it stays empty.

    On a disk the kernel locks a file and releases it when the process ends. In an object store the lock is an object
    that the process renews. Yields a function that returns whether the lock is still held: on a disk it always is, and
    in a store it asks the store only if the lock was not renewed for so long that another process may have taken it.

    Raises:
        UserError: another process holds the lock, `output` is a file, or it lies inside a shard set.
    """
    check_place(output)
    with _locked_file(output) if isinstance(output, Path) else _lease(output) as held:
        yield held


def check_held(output: Location, held: Callable[[], bool]) -> None:
    """Raise UserError if the lock of `output`, with the function that `exclusive` yields, is no longer held."""
    if not held():
        raise UserError(f"--output {output}: another run has taken over its lock; rerun the same command when it ends")


def check_place(output: Location) -> None:
    """Raise UserError if `output` cannot be a directory of its own: it is or lies below a file, or in a shard set.

    Nor may its lock be a link.
    """
    if inside := enclosing_shard_set(output):
        raise UserError(f"--output {output}: lies inside the shard set {inside}; choose a directory outside it")
    paths = (output, *output.parents) if isinstance(output, Path) else ()
    if any(os.path.lexists(path) and not os.path.isdir(path) for path in paths):
        raise UserError(f"--output {output}: is, or lies below, a file; choose another --output")
    if isinstance(output, Path) and (output / LOCK).is_symlink():
        raise UserError(f"--output {output}: its {LOCK} is a link, which would lead to a new file elsewhere; remove it")


def enclosing_shard_set(path: Location) -> Location | None:
    """The shard set that `path` lies in; None if it lies in none. On a disk, links are followed first."""
    parents = path.resolve().parents if isinstance(path, Path) else path.parents
    return next(filter(is_shard_set, parents), None)


def is_shard_set(path: Location) -> bool:
    """Whether a directory looks like a shard set. Its content is not checked."""
    return (path / MANIFEST).exists() and (path / TOKENIZER).is_dir()


def _refusal(output: Location, holder: str) -> UserError:
    return UserError(f"--output {output}: {holder} is writing to it; wait or choose another")


@contextmanager
def _locked_file(output: Path) -> Iterator[Callable[[], bool]]:
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = output / LOCK  # not the directory: network file systems do not share directory locks between machines
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refusal(output, "another process") from error
        if not os.fstat(descriptor).st_nlink:
            raise _refusal(output, "another process")  # it has just finished and removed its lock
        try:
            yield lambda: True
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        if new:
            with suppress(OSError):
                output.rmdir()


@contextmanager
def _lease(output: UPath) -> Iterator[Callable[[], bool]]:
    lock = output / LOCK
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    name = f"{holder} {uuid4().hex}"
    renewed_at = time.monotonic()
    if not _create(lock, name):
        found = _content(lock)
        logger.warning("%s: locked by %s; checking whether it is alive", output, " ".join(found.split()[:4]))
        time.sleep(3 * RENEWAL_SECONDS)
        if _content(lock) == found:
            lock.unlink(missing_ok=True)
        renewed_at = time.monotonic()
        created = _create(lock, name)
        time.sleep(RENEWAL_SECONDS / 10)  # another process may have mistaken this lock for the old one and removed it
        if not created or not _content(lock).startswith(name):
            raise _refusal(output, " ".join(_content(lock).split()[:4]))
    done = threading.Event()

    def renew() -> None:
        nonlocal renewed_at
        while not done.wait(RENEWAL_SECONDS):
            started = time.monotonic()
            with suppress(Exception):  # stores may be temporarily unavailable, and raise different exceptions
                if not _content(lock).startswith(name):
                    renewed_at = -inf
                    logger.error("%s: this run no longer holds its lock; it stops", output)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # also interrupts a wait
                    return
                lock.write_bytes(f"{name} {time.time()}".encode())
                renewed_at = started

    def held() -> bool:
        return time.monotonic() < renewed_at + 3 * RENEWAL_SECONDS or _content(lock).startswith(name)

    renewal = threading.Thread(target=renew, daemon=True)
    renewal.start()
    try:
        yield held
    finally:
        done.set()
        renewal.join()
        with suppress(Exception):  # a leftover lock expires
            if _content(lock).startswith(name):
                lock.unlink(missing_ok=True)


def _create(lock: UPath, content: str) -> bool:
    """Create the lock; False if it exists. Of several concurrent attempts, one succeeds."""
    try:
        lock.fs.pipe_file(lock.path, content.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def _content(lock: UPath) -> str:
    try:
        return lock.fs.cat_file(lock.path).decode()  # a single request: a change between two requests would be an error
    except FileNotFoundError:
        return ""
