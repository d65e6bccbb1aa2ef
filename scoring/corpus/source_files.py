"""The sources of a corpus in reading order: files, or a split of a Hugging Face dataset."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

from upath import UPath

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.compression import data_suffix
from weighted_mtp.schemas.storage.links import expand
from weighted_mtp.schemas.storage.locations import Location, join, kind_of, locate, walk_tree
from weighted_mtp.schemas.text import is_utf8, printable

if TYPE_CHECKING:
    from datasets import DatasetBuilder

Format = Literal["json", "parquet", "text", "csv", "arrow"]
FORMATS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
DATASETS_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files written by `datasets` beside its data."""
DATASETS_CACHE = re.compile(r"cache-[0-9a-f]{16}.*\.arrow")
"""Names of results of `map` and `filter`, which `datasets` writes there, too."""


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus. `name` is relative to the input, so document ids do not change when a corpus is moved."""

    path: Location
    name: str
    format: Format
    bytes: int

    def describe(self) -> dict[str, str | int]:
        """Identity of the file in the request of a run."""
        return {"name": self.name, "format": self.format, "bytes": self.bytes}


@dataclass(frozen=True)
class HubSplit:
    """A split of a Hugging Face dataset, read as a stream."""

    builder: "DatasetBuilder"
    name: str
    split: str

    def describe(self) -> dict[str, str | int]:
        """Identity of the dataset in the request of a run."""
        return {"name": self.name, "revision": str(self.builder.hash)}


Source = CorpusFile | HubSplit


class Sources(NamedTuple):
    """The sources of a corpus in reading order, and the names of files beside them that are left out, sorted."""

    read: list[Source]
    left_out: list[str]


def find_sources(
    name: str, given: Format | Literal["auto"] = "auto", subset: str | None = None, split: str = "train"
) -> Sources:
    """Sources of a corpus in reading order. Files are sorted by name, independent of the file system.

    On a disk, links to files and directories are followed, but not in circles.

    Args:
        name: file, directory, glob, or Hugging Face dataset id.
        given: format of the files; `auto` infers it from each file name.
        subset: configuration of a Hugging Face dataset.
        split: split of a Hugging Face dataset.

    Raises:
        UserError: no such path, no readable file, a file of unknown format, or a subset or split of files.
    """
    files = find_files(name, given)
    if files is None:
        return Sources([hub_split(name, subset, split)], [])
    if subset is not None or split != "train":
        raise UserError(
            f"--input {name}: --subset and --split are for datasets of the Hugging Face hub, and these are files; "
            "give the files or the directory of the split as --input"
        )
    return files


def find_files(name: str, given: Format | Literal["auto"] = "auto") -> Sources | None:
    """Files of a corpus in reading order; None if `name` can only be a Hugging Face dataset id.

    Raises:
        UserError: as for `find_sources`.
    """
    path = locate(name)
    kind = kind_of(path)
    if kind == "file":
        return Sources(corpus_files(path.parent, {path.name: path.stat().st_size}, given), [])
    if kind == "directory":
        return files_below(path, given)
    if glob.has_magic(name):
        return files_matching(name, given)
    if looks_like_path(name):
        raise UserError(f"--input {name}: no such file or directory; check the path")
    return None


def files_below(root: Location, given: Format | Literal["auto"]) -> Sources:
    """All files below the directory `root`, except hidden ones and, with `auto`, files of unknown format.

    What `datasets` writes beside its data is left out, too.
    """
    found, unreadable = walk_tree(root)
    files = {
        name: size
        for name, size in found.items()
        if not any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
        and PurePosixPath(name).name not in DATASETS_METADATA
        and not DATASETS_CACHE.fullmatch(PurePosixPath(name).name)
        and (given != "auto" or format_of(name) is not None)
    }
    if not files:
        known = f" ({', '.join(FORMATS)}, also compressed)" if given == "auto" else ""
        raise UserError(f"--input {root}: holds no readable file{known}; check the path or give --format")
    return Sources(corpus_files(root, files, given), sorted([*unreadable, *(found.keys() - files.keys())]))


def files_matching(name: str, given: Format | Literal["auto"]) -> Sources:
    """Files that match a glob, named relative to the part of the path before the first wildcard.

    Left out are directories that match, unless a file in them does, and broken links.
    """
    pattern = locate(name)
    root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if isinstance(pattern, Path):
        paths = [Path(match) for match in expand(str(pattern))]
        found = {
            path.relative_to(str(root)).as_posix(): path.stat().st_size if path.is_file() else None for path in paths
        }
    else:
        found = remote_matches(root, pattern)
    files = {match: size for match, size in found.items() if size is not None}
    if not files:
        raise UserError(f"--input '{name}': matches no file; check the pattern")
    read = {str(parent) for match in files for parent in PurePosixPath(match).parents}
    return Sources(corpus_files(root, files, given), sorted(found.keys() - files.keys() - read))


def remote_matches(root: Location, pattern: UPath) -> dict[str, int | None]:
    """Name relative to `root` of what matches a glob, and the size of files. Wildcards do not match hidden names."""
    found = pattern.fs.glob(pattern.path, detail=True)
    start = pattern.fs._strip_protocol(str(root)).rstrip("/") + "/"
    sizes = {
        name.removeprefix(start): info["size"] if info["type"] == "file" else None
        for name, info in found.items()
        if name.startswith(start)  # `**` also matches the root
    }
    hidden_wanted = "/." in pattern.path
    return {name: size for name, size in sizes.items() if hidden_wanted or "/." not in f"/{name}"}


def corpus_files(root: Location, files: dict[str, int], given: Format | Literal["auto"]) -> list[Source]:
    """Describe files, sorted by name.

    Args:
        root: directory of the files.
        files: name relative to `root` and size in bytes of each file.
        given: format of all files, or `auto`.

    Raises:
        UserError: a file of unknown format, or with a name that is no UTF-8.
    """
    described: list[Source] = []
    for name, size in sorted(files.items()):
        if not is_utf8(name):
            raise UserError(f"{printable(str(root / name))}: the name is not in UTF-8; rename it")
        file_format = format_of(name) if given == "auto" else given
        if file_format is None:
            raise UserError(f"{root / name}: the file name does not indicate a format; give --format")
        described.append(CorpusFile(join(root, name), name, file_format, size))
    return described


def format_of(name: str) -> Format | None:
    """The format that a file name indicates, compressed or not; None if unknown."""
    return FORMATS.get(data_suffix(PurePosixPath(name)))


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be a path, not a dataset id such as `name` or `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None or format_of(name) is not None


def hub_split(name: str, subset: str | None, split: str) -> HubSplit:
    """Look up a dataset on the Hugging Face hub."""
    from datasets import load_dataset_builder  # takes a second, which other corpora and early checks do not need
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(name, subset)
        builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"--input {name}: no such file or directory, and no dataset available from the Hugging Face hub "
            f"({first_line(error)}); check --input, --subset and --split"
        ) from error
    return HubSplit(builder, "/".join(filter(None, (name, subset, split))), split)
