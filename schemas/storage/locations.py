"""Where data lies: local paths, and object stores through fsspec (`s3://`, `gs://`, `hf://`, ...).

Everything that reads or writes data takes a `Location`. This folder deals with the differences between a store and a
disk: object stores have no rename, no directories and no locks, but an object appears complete or not at all.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from pydantic import AfterValidator, PlainSerializer, PlainValidator
from upath import UPath

from weighted_mtp.schemas.errors import UserError

Location = Path | UPath
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extra of this distribution that brings the file system of a protocol."""


def locate(name: Any) -> UPath:
    """The location that a string or path names; local ones are also `pathlib.Path`s.

    Raises:
        ValueError: a protocol that is unknown or whose package is not installed.
    """
    try:
        location = UPath(name)
    except ValueError as error:
        raise ValueError(f"{error}; give a path, or an address such as s3://, gs:// or hf://") from error
    if location.protocol in ("file", "local"):
        return UPath(location.path)
    if location.protocol:
        # What other processes wrote must be seen at once.
        location = UPath(location, use_listings_cache=False)
        try:
            fsspec.get_filesystem_class(location.protocol)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(location.protocol)
            remedy = f"install 'weighted-mtp[{extra}]'" if extra else "install the package of this file system"
            raise ValueError(f"{location.protocol}:// cannot be used here ({error}); {remedy}") from error
    return location


LocationSetting = Annotated[UPath, PlainValidator(locate), PlainSerializer(str, return_type=str)]
"""A location as the field of a config."""


def is_address(name: str) -> bool:
    """Whether a name that may also be a path, or an id on the Hugging Face hub, is an address such as `s3://...`."""
    return "://" in name


def _check_name(name: str) -> str:
    if is_address(name):
        locate(name)
    return name


NameSetting = Annotated[str, AfterValidator(_check_name)]
"""A path, an address, or an id on the Hugging Face hub as the field of a config."""


def kind_of(location: Location) -> Literal["file", "directory"] | None:
    """What lies there, None if nothing does; unlike `is_file`, a store that does not answer is an error."""
    if isinstance(location, Path):
        return "file" if location.is_file() else "directory" if location.is_dir() else None
    try:
        return location.fs.info(location.path)["type"]
    except FileNotFoundError:
        return None


def walk(directory: Location) -> dict[str, int]:
    """Relative name and size in bytes of every file below a directory."""
    if isinstance(directory, Path):
        return {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in directory.rglob("*")
            if path.is_file()
        }
    found = directory.fs.find(directory.path, detail=True)
    start = directory.path.rstrip("/") + "/"
    return {name.removeprefix(start): info["size"] for name, info in found.items() if not name.endswith("/")}


def list_files(directory: Location) -> dict[str, int]:
    """Name and size in bytes of every file directly in a directory, from one listing; an absent one holds none."""
    try:
        if isinstance(directory, Path):
            with os.scandir(directory) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        directory.fs.invalidate_cache()  # of file systems that keep listings in any case
        found = directory.fs.ls(directory.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}
    return {name: size for name, size in files.items() if name}  # some tools keep an empty object as the directory


def resolve(location: Location) -> Location:
    """The location independent of the working directory, for processes that have another one."""
    return location.resolve() if isinstance(location, Path) else location


def remove_tree(directory: Location) -> None:
    """Remove a directory and everything in it; an absent one is no error."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
        return
    directory.fs.invalidate_cache()
    if directory.fs.exists(directory.path):
        directory.fs.rm(directory.path, recursive=True)


def cache_directory() -> Path:
    """Where this machine keeps what it can get again from a store."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weighted-mtp"


def local_copy(directory: Location) -> Path:
    """The directory itself if it is local, else a copy of its files in the user's cache, made once for each content.

    Raises:
        UserError: it holds no files.
    """
    if isinstance(directory, Path):
        return directory
    names = sorted(list_files(directory))
    if not names:
        raise UserError(f"{directory}: no such directory, or no files in it; check the address")
    fs = directory.fs
    cache = cache_directory()
    content = [str(directory), *(f"{name} {fs.ukey((directory / name).path)}" for name in names)]
    copy = cache / hashlib.sha256("\n".join(content).encode()).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{copy.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine downloads, the others wait for it
        if not copy.exists():
            partial = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
            try:
                for name in names:
                    fs.get_file((directory / name).path, str(partial / name))
                with suppress(OSError):  # another machine that shares the cache may have been faster
                    partial.rename(copy)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return copy


def local_name(name: str) -> str:
    """What to give to libraries that know only disks and the hub: a copy of a remote directory, else `name` itself."""
    return str(local_copy(locate(name))) if is_address(name) else name
