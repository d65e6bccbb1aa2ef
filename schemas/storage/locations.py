"""Locations of data: local paths, and object stores through fsspec (`s3://`, `gs://`, `hf://`, ...).

All code that reads or writes data takes a `Location`. This package handles the differences between a disk and an object
store, which has no rename, no directories and no locks, but writes objects atomically.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from pydantic import AfterValidator, BeforeValidator, PlainSerializer, PlainValidator
from upath import UPath

from weighted_mtp.schemas.errors import SettingsError, UserError
from weighted_mtp.schemas.storage.links import walk_disk
from weighted_mtp.schemas.text import is_utf8, printable

Location = Path | UPath
PACKAGES = {
    "s3": "weighted-mtp[s3]",
    "s3a": "weighted-mtp[s3]",
    "gs": "weighted-mtp[gcs]",
    "gcs": "weighted-mtp[gcs]",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
}
"""Protocols of addresses, and the package that installs the file system of each."""


def locate(name: Any) -> UPath:
    """The location of a path, which may start with `~`, or of an address. Local locations are also `pathlib.Path`s.

    Raises:
        SettingsError: the name is no path, empty or no UTF-8, a home directory or the protocol is unknown, its package
            is not installed, or an address lacks its first parts.
    """
    _check_not_empty(name)
    if not isinstance(name, str | os.PathLike | UPath):
        raise ValueError(f"should be a string, not {name!r}")
    name = expand_home(name)
    if not is_utf8(str(name)):
        raise SettingsError(f"'{printable(str(name))}' is not in UTF-8; rename it")
    if isinstance(name, str):
        name = re.sub("^file://localhost/", "file:///", name)
    protocol, mark, rest = str(name).partition("://")
    try:
        location = UPath(name) if not mark or protocol in ("file", "local", *PACKAGES) else None
    except (ValueError, TypeError, ImportError):  # raised for some addresses
        location = None
    if location is not None and location.protocol in ("", "file", "local"):
        return UPath(location.path) if location.protocol else location
    if location is None or not mark:
        known = ", ".join(f"{known}://" for known in PACKAGES)
        raise SettingsError(f"'{printable(str(name))}' is neither a path nor an address with {known}; correct it")
    if protocol == "hf" and not re.match("((models|datasets|spaces|buckets)/)?+[^/]+/[^/]+", rest):
        raise SettingsError(f"{name} should name an owner, such as hf://owner/name or hf://datasets/owner/name")
    if not rest or rest.startswith("/"):
        raise SettingsError(f"{name} should have a bucket or a host after '://'")
    # Writes of other processes must be visible immediately.
    location = UPath(location, use_listings_cache=False)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"{protocol}:// cannot be used here ({error}); install '{PACKAGES[protocol]}'") from error
    return location


def expand_home(name: Any) -> Any:
    """Replace a leading `~` or `~user` of a name, which shells leave alone in `--flag=~/x`, and YAML files everywhere.

    Raises:
        SettingsError: there is no such home directory.
    """
    if not isinstance(name, str) or not name.startswith("~"):
        return name
    expanded = os.path.expanduser(name)
    if expanded.startswith("~"):
        raise SettingsError(
            f"no home directory for '{name.split('/')[0]}'; write './{name}' for a name that starts with ~"
        )
    return expanded


LocationSetting = Annotated[UPath, PlainValidator(locate), PlainSerializer(str, return_type=str)]
"""Config field type of a location."""


def local_path(name: Any) -> Path:
    """The path of a local location.

    Raises:
        ValueError: as for `locate`, or it is an address.
    """
    location = locate(name)
    if not isinstance(location, Path):
        raise ValueError(f"{location} should be a path on this machine")
    return Path(location)


PathSetting = Annotated[Path, BeforeValidator(local_path)]
"""Config field type of a path on the local disk."""


def is_address(name: str) -> bool:
    """Whether a name is an address such as `s3://...`, not a local path or a Hugging Face id."""
    return "://" in name


def is_missing_directory(name: str | Path) -> bool:
    """Whether a name can only be a local path, because no Hugging Face id looks like it, and no directory is there."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    return is_path and not Path(name).is_dir()


def _check_not_empty(name: Any) -> None:
    if name == "":
        raise SettingsError("a path should not be empty")


def _check_name(name: str) -> str:
    locate(name)
    return expand_home(name)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Location) else value


NameText = Annotated[str, BeforeValidator(_as_text)]
"""A name given as a text or, from Python, as a location."""

NameSetting = Annotated[NameText, AfterValidator(_check_name)]
"""Config field type of a path, an address, or a Hugging Face id."""


def join(directory: Location, name: str) -> Location:
    """A file below a directory. On a disk, its name may look like an address, such as `http:/a` or `data:a,b`."""
    return Path(directory) / name if isinstance(directory, Path) else directory / name


def kind_of(location: Location) -> Literal["file", "directory"] | None:
    """Whether a location is a file or a directory; None if missing. Raises if a store does not answer.

    Raises:
        UserError: it is a pipe or a device.
    """
    if isinstance(location, Path):
        if location.is_file() or location.is_dir():
            return "file" if location.is_file() else "directory"
        if location.exists():
            raise UserError(f"{location}: is a pipe or a device; write its content to a file, and give that")
        return None
    try:
        return location.fs.info(location.path)["type"]
    except FileNotFoundError as error:
        cause = error.__cause__  # what a web server answers, or why it does not: fsspec calls all this missing
        if location.protocol in ("http", "https") and cause and getattr(cause, "status", None) != 404:
            raise cause from None
        return None


def walk_tree(directory: Location) -> tuple[dict[str, int], list[str]]:
    """All files below a directory, recursively; on a disk, also through links, as in `walk_disk`.

    Returns:
        Relative name and size in bytes of every file, and the relative names of what cannot be read.
    """
    if isinstance(directory, Path):
        return walk_disk(directory)
    found = directory.fs.find(directory.path, detail=True)
    start = directory.path.rstrip("/") + "/"
    sizes = {name.removeprefix(start): info["size"] for name, info in found.items() if not name.endswith("/")}
    inside = {name: size for name, size in sizes.items() if _is_inside(name)}
    return inside, sorted(sizes.keys() - inside.keys())


def walk_files(directory: Location) -> dict[str, int]:
    """Relative name and size in bytes of every file below a directory, as in `walk_tree`."""
    return walk_tree(directory)[0]


def list_files(directory: Location) -> dict[str, int]:
    """Name and size in bytes of every file directly in a directory, from one listing; empty if it is missing."""
    try:
        if isinstance(directory, Path):
            with os.scandir(directory) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        directory.fs.invalidate_cache()  # some file systems always cache listings
        found = directory.fs.ls(directory.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}
    # Some tools create an empty object for a directory.
    return {name: size for name, size in files.items() if name and _is_inside(name)}


def _is_inside(name: str) -> bool:
    """Whether a name, below a local directory, is a path in it. An object store accepts any text, such as `../x`."""
    return not name.startswith("/") and "\0" not in name and not {".", ".."} & set(name.split("/"))


def resolve(location: Location) -> Location:
    """The absolute location, for processes with another working directory."""
    return location.resolve() if isinstance(location, Path) else location


def remove_tree(directory: Location) -> None:
    """Remove a directory and everything in it. It may be missing."""
    if isinstance(directory, Path):
        shutil.rmtree(directory, ignore_errors=True)
        return
    directory.fs.invalidate_cache()
    if directory.fs.exists(directory.path):
        directory.fs.rm(directory.path, recursive=True)


def cache_directory() -> Path:
    """Local directory for copies of remote data.

    Raises:
        UserError: neither XDG_CACHE_HOME nor a home directory is known.
    """
    if (cache := os.environ.get("XDG_CACHE_HOME")) is None:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise UserError("no home directory for copies of remote data; set HOME or XDG_CACHE_HOME") from error
    return Path(cache) / "weighted-mtp"


def local_copy(directory: Location) -> Path:
    """A local directory with the files of `directory`: itself, or a copy in the user's cache, made once per content.

    Raises:
        UserError: the directory is missing or empty.
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
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process per machine downloads, the others wait
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
    """A name for libraries without support for stores: a local copy of a remote directory, else `name` itself."""
    return str(local_copy(locate(name))) if is_address(name) else name
