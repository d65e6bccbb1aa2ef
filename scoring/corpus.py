"""Finding a corpus: which files, or which split of a Hugging Face dataset, `--input` means, and in which order."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from datasets import DatasetBuilder, load_dataset_builder
from datasets.exceptions import DatasetsError

from schemas.configs import PrepareConfig
from schemas.errors import UserError, first_line

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

    path: Path
    name: str
    format: Format

    def describe(self) -> dict[str, str | int]:
        """What a later run compares to see whether the input is still the same."""
        return {"name": self.name, "format": self.format, "bytes": self.path.stat().st_size}


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
    path = Path(config.input)
    if path.is_file():
        return [corpus_file(path, path.parent, config)]
    if path.is_dir():
        if path.resolve() in config.output.resolve().parents:
            raise UserError(f"--output {config.output}: lies inside --input {path}; choose a directory outside it")
        return files_below(path, config)
    if glob.has_magic(config.input):
        return files_matching(config)
    if looks_like_path(config.input):
        raise UserError(f"--input {config.input}: no such file or directory; check the path")
    return [hub_split(config)]


def files_below(root: Path, config: PrepareConfig) -> list[Source]:
    """Every file below the directory `root` that is not hidden and, with `--format auto`, has a known name."""
    files = [
        path
        for path in root.rglob("*")
        if not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
        and path.name not in BOOKKEEPING
        and (config.format != "auto" or format_of(path) is not None)
        and path.is_file()
    ]
    if not files:
        known = f" ({', '.join(FORMATS)}, also compressed)" if config.format == "auto" else ""
        raise UserError(f"--input {root}: holds no file to read{known}; check the path or give --format")
    return in_order([corpus_file(path, root, config) for path in files])


def files_matching(config: PrepareConfig) -> list[Source]:
    """The files that a glob matches, named relative to its part without wildcards."""
    parts = PurePath(config.input).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    files = [Path(match) for match in glob.glob(config.input, recursive=True) if os.path.isfile(match)]
    if not files:
        raise UserError(f"--input '{config.input}': matches no file; check the pattern")
    return in_order([corpus_file(path, Path(*parts[:fixed]), config) for path in files])


def corpus_file(path: Path, root: Path, config: PrepareConfig) -> CorpusFile:
    """Describe one file; UserError if its format is neither given nor known by its name."""
    file_format = format_of(path) if config.format == "auto" else config.format
    if file_format is None:
        raise UserError(f"{path}: the name does not tell the format; give --format")
    return CorpusFile(path, path.relative_to(root).as_posix(), file_format)


def in_order(files: list[CorpusFile]) -> list[Source]:
    """Sort by name."""
    return [*sorted(files, key=lambda file: file.name)]


def format_of(path: PurePath) -> Format | None:
    """The format that a file name stands for, compressed or not; None if it is unknown."""
    return FORMATS.get(data_suffix(path))


def data_suffix(path: PurePath) -> str:
    """The suffix of a file name in lower case, without the compression: `.jsonl` for `a.JSONL.gz`."""
    name = PurePath(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a path, not as a dataset `name` or `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None or format_of(PurePath(name)) is not None


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
