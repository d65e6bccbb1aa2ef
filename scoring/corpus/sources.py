"""Finding a corpus: which files, or which split of a Hugging Face dataset, `--input` means, and in which order."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

from datasets import DatasetBuilder, load_dataset_builder
from datasets.exceptions import DatasetsError
from upath import UPath

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.locations import Location, kind_of, locate, resolve, walk

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
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BOOKKEEPING = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files that `datasets` writes beside the data it saves."""


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus. `name` is relative to the input, so that a corpus that was moved keeps its document ids."""

    path: Location
    name: str
    format: Format
    bytes: int

    def describe(self) -> dict[str, str | int]:
        """What a later run compares to see whether the input is still the same."""
        return {"name": self.name, "format": self.format, "bytes": self.bytes}


@dataclass(frozen=True)
class HubSplit:
    """A split of a Hugging Face dataset, read as a stream."""

    builder: DatasetBuilder
    name: str
    split: str

    def describe(self) -> dict[str, str | int]:
        """What a later run compares to see whether the input is still the same."""
        return {"name": self.name, "revision": str(self.builder.hash)}


Source = CorpusFile | HubSplit


def find_sources(config: PrepareConfig) -> list[Source]:
    """The sources of the corpus in reading order: files by name, which does not depend on the file system.

    Raises:
        UserError: nothing there, nothing that can be read, or a file whose format cannot be told.
    """
    path = locate(config.input)
    kind = kind_of(path)
    if kind == "file":
        return corpus_files(path.parent, {path.name: path.stat().st_size}, config)
    if kind == "directory":
        if resolve(path) in resolve(config.output).parents:
            raise UserError(f"--output {config.output}: lies inside --input {path}; choose a directory outside it")
        return files_below(path, config)
    if glob.has_magic(config.input):
        return files_matching(path, config)
    if looks_like_path(config.input):
        raise UserError(f"--input {config.input}: no such file or directory; check the path")
    return [hub_split(config)]


def files_below(root: Location, config: PrepareConfig) -> list[Source]:
    """Every file below the directory `root` that is not hidden and, with `--format auto`, has a known name."""
    files = {
        name: size
        for name, size in walk(root).items()
        if not any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
        and PurePosixPath(name).name not in BOOKKEEPING
        and (config.format != "auto" or format_of(name) is not None)
    }
    if not files:
        known = f" ({', '.join(FORMATS)}, also compressed)" if config.format == "auto" else ""
        raise UserError(f"--input {root}: holds no file to read{known}; check the path or give --format")
    return corpus_files(root, files, config)


def files_matching(pattern: Location, config: PrepareConfig) -> list[Source]:
    """The files that a glob matches, named relative to its part without wildcards."""
    root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if isinstance(pattern, Path):
        found = [Path(match) for match in glob.glob(str(pattern), recursive=True) if os.path.isfile(match)]
        files = {path.relative_to(str(root)).as_posix(): path.stat().st_size for path in found}
    else:
        files = remote_matches(root, pattern)
    if not files:
        raise UserError(f"--input '{config.input}': matches no file; check the pattern")
    return corpus_files(root, files, config)


def remote_matches(root: Location, pattern: UPath) -> dict[str, int]:
    """Name relative to `root` and size of the files that a glob matches; a wildcard stands for no hidden name."""
    found = pattern.fs.glob(pattern.path, detail=True)
    start = pattern.fs._strip_protocol(str(root)).rstrip("/") + "/"
    files = {name.removeprefix(start): info["size"] for name, info in found.items() if info["type"] == "file"}
    hidden_wanted = "/." in pattern.path
    return {name: size for name, size in files.items() if hidden_wanted or "/." not in f"/{name}"}


def corpus_files(root: Location, files: dict[str, int], config: PrepareConfig) -> list[Source]:
    """Describe files, given by name relative to `root` and size, in the order of their names.

    Raises:
        UserError: the format of one is neither given nor known by its name.
    """
    described: list[Source] = []
    for name, size in sorted(files.items()):
        file_format = format_of(name) if config.format == "auto" else config.format
        if file_format is None:
            raise UserError(f"{root / name}: the name does not tell the format; give --format")
        described.append(CorpusFile(root / name, name, file_format, size))
    return described


def format_of(name: str) -> Format | None:
    """The format that a file name stands for, compressed or not; None if it is unknown."""
    return FORMATS.get(data_suffix(PurePosixPath(name)))


def data_suffix(path: PurePath | Location) -> str:
    """The suffix of a file name in lower case, without the compression: `.jsonl` for `a.JSONL.gz`."""
    name = PurePath(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a path, not as a dataset `name` or `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None or format_of(name) is not None


def hub_split(config: PrepareConfig) -> HubSplit:
    """Look up a dataset on the Hugging Face hub."""
    try:
        builder = load_dataset_builder(config.input, config.subset)
        builder.as_streaming_dataset(split=config.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"--input {config.input}: no such file or directory, and not a dataset that the Hugging Face hub gives "
            f"({first_line(error)}); check --input, --subset and --split"
        ) from error
    return HubSplit(builder, "/".join(filter(None, (config.input, config.subset, config.split))), config.split)
