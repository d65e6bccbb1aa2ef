"""Walking directories and expanding globs on a disk, through links but not in circles."""

import glob
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def walk_disk(directory: Path) -> tuple[dict[str, int], list[str]]:
    """All files below a directory, also through links.

    Returns:
        Relative name and size in bytes of every file, and the relative names of what cannot be read: broken links,
        links in a circle, directories without permission, pipes, and files that vanish meanwhile.
    """
    sizes: dict[str, int] = {}
    unreadable: list[str] = []
    failed: list[str] = []
    for folder, _, names in walk(str(directory), failed):
        for path in (Path(folder, name) for name in names):
            name = path.relative_to(directory).as_posix()
            try:
                if path.is_file():
                    sizes[name] = path.stat().st_size
                    continue
            except OSError:
                pass
            unreadable.append(name)
    return sizes, [*unreadable, *(Path(path).relative_to(directory).as_posix() for path in failed)]


def walk(top: str, failed: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` through links. A directory is not entered again below itself.

    Args:
        top: path of the directory to start with.
        failed: receives the paths of circles, and of directories that cannot be read.
    """
    around: dict[str, frozenset[tuple[int, int]]] = {}  # identities of a directory and of those that lead to it
    for folder, folders, names in os.walk(top, followlinks=True, onerror=lambda error: failed.append(error.filename)):
        outer = around.pop(folder, None) or frozenset([identity(folder)])
        for name in list(folders):
            path = os.path.join(folder, name)
            try:
                inner = identity(path)
            except OSError:
                inner = None
            if inner is None or inner in outer:
                folders.remove(name)
                failed.append(path)
            else:
                around[path] = outer | {inner}
        yield folder, folders, names


def identity(path: str) -> tuple[int, int]:
    """Device and number of the file or directory that a path leads to."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def expand(pattern: str) -> Iterator[str]:
    """Paths that match a glob, through links. `**` stands for any directories that are not hidden.

    Paths in a circle are left out, as in a walk of the directory before the first wildcard.
    """
    fixed = next(parent for parent in Path(pattern).parents if not glob.has_magic(str(parent)))
    known = cache(identity)
    for path in matches(pattern):
        parents = Path(path).parents
        folders = [known(str(parent)) for parent in parents[: len(parents) - len(fixed.parents)]]
        if len(set(folders)) == len(folders):
            yield path


def matches(pattern: str) -> Iterator[str]:
    """Paths that match a glob. Below the directories before each `**`, there are none in a circle."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index("**")
    start, rest = "/".join(parts[:first]), parts[first + 1 :] or ["*"]
    tops = glob.glob(start) if start else ["/" if pattern.startswith("/") else "."]
    for top in filter(os.path.isdir, tops):
        for folder, folders, _ in walk(top, []):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from matches("/".join([glob.escape(folder.rstrip("/")), *rest]))
