"""What puts a Ray on this machine out of reach of other users and other jobs: a directory, a token and loopback.

By default Ray makes its directories writable by everyone, and keeps a token per user in a file that everyone can read.
"""

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

from weighted_mtp.schemas.storage.locations import cache_directory

ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""If 0, Ray joins no cluster and binds all its ports to loopback, as on Windows and macOS."""
PREFIX = "wmtp-"
LOCK = "lock"
KEPT_SECONDS = 86400.0
"""Least age at which a directory of a failed or killed job is removed. Until then its logs can be read."""


@contextmanager
def private_surroundings() -> Iterator[None]:
    """Inside the block, a Ray that this process starts serves this process and its children only.

    Their temporary files are in a new directory of mode 0700 inside the one that the user has chosen. If the block
    raises an exception, the directory remains, with Ray's logs, until a later job removes it.

    Raises:
        OSError: the directory cannot be made.
        UserError: no home directory for caches.
    """
    usual = tempfile.gettempdir()  # Python does not look at TMPDIR again
    parent = Path(os.environ.get("RAY_TMPDIR", usual))
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_directory() / "torchinductor")
    remove_abandoned(parent)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    settings = {
        "RAY_TMPDIR": str(directory),
        "TMPDIR": str(directory),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "TORCHINDUCTOR_CACHE_DIR": cache,  # by default below TMPDIR
        ON_LOOPBACK: "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    failed = False
    try:
        with (directory / LOCK).open("w") as lock, ray_settings(settings):
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except Exception:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def ray_settings(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block, read again by Ray, which then joins no cluster."""
    before = dict(os.environ)
    joins_clusters = ray_constants.ENABLE_RAY_CLUSTER
    try:
        os.environ.update(variables)
        ray_constants.ENABLE_RAY_CLUSTER = False
        read_token_settings()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = joins_clusters
        for name in variables:
            os.environ.pop(name)
        os.environ.update({name: value for name, value in before.items() if name in variables})
        read_token_settings()


def read_token_settings() -> None:
    """Let Ray in this process read its token and its mode of authentication again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def remove_abandoned(parent: Path) -> None:
    """Remove directories of this user's failed and killed jobs that are older than `KEPT_SECONDS`."""
    for directory in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = directory.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < KEPT_SECONDS:
                continue
            with (directory / LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the job runs
                shutil.rmtree(directory, ignore_errors=True)
