"""Opening and finishing shard sets."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from weighted_mtp.schemas.errors import UserError, first_line, lacks_memory
from weighted_mtp.schemas.shard_set.bounded_arrow import read_arrow_table
from weighted_mtp.schemas.shard_set.card import describe_set
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest
from weighted_mtp.schemas.shard_set.manifest import Manifest, TokenizerInfo, read_manifest, write_manifest
from weighted_mtp.schemas.shard_set.notebook import describe_html, describe_line
from weighted_mtp.schemas.shard_set.sequences import TokenSequence, split_sequences
from weighted_mtp.schemas.shard_set.shards import RESTORE, ShardFile, ShardReader, flat_values, shard_schema
from weighted_mtp.schemas.shard_set.value_counts import (
    TABLE_SCHEMA,
    ValueCounts,
    from_table,
    most_table_bytes,
    to_table,
)
from weighted_mtp.schemas.storage.claims import release_output
from weighted_mtp.schemas.storage.files import (
    DATA,
    MANIFEST,
    TOKENIZER,
    atomic_write,
    differences,
    fsync_tree,
    sha256_file,
    write_text,
)
from weighted_mtp.schemas.storage.locations import Location, list_files, locate

CARD = "README.md"
STATISTICS = "statistics.arrow"
REJECTS = "rejects.jsonl"
MOST_TOKENIZER_BYTES = 1 << 28
"""Largest file of a tokenizer that is read."""
MOST_REJECTS_BYTES = 1 << 28
"""Largest `rejects.jsonl` that is read; a sequence takes about 300 bytes."""
SAMPLED_FOOTERS = 256
"""Most footers read to measure column sizes, from evenly spaced shards. Each costs requests to an object store."""


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set: a directory and the manifest that describes it."""

    path: Location
    manifest: Manifest

    def __repr__(self) -> str:
        return describe_line(self.path, self.manifest)

    def _repr_html_(self) -> str:
        return describe_html(self.path, self.manifest)

    @classmethod
    def open(cls, path: str | Location) -> "ShardSet":
        """Open a shard set. Checks the manifest, the tokenizer, and the size of every shard.

        Raises:
            UserError: not a finished shard set, an edited manifest, another tokenizer, a missing or truncated shard, or
                a link out of the set.
        """
        path = locate(path)
        manifest = read_manifest(path)
        if fault := find_foreign_entry(path):
            raise UserError(f"{fault}; {RESTORE}")
        sizes = list_files(path / DATA)
        for shard in manifest.shards:
            file = path / DATA / shard.name
            size = sizes.get(shard.name)
            if size is None:
                raise UserError(f"{file}: shard is missing; {RESTORE}")
            if size != shard.bytes:
                raise UserError(
                    f"{file}: shard has {size} bytes instead of {shard.bytes} (truncated or replaced); {RESTORE}"
                )
        if fault := check_tokenizer(path, manifest.tokenizer):
            raise UserError(f"{fault}; {RESTORE}")
        return cls(path, manifest)

    @property
    def tokenizer_path(self) -> Location:
        """Directory of the corpus's tokenizer."""
        return self.path / TOKENIZER

    @cached_property
    def reader(self) -> ShardReader:
        """Reads shards of the set."""
        corpus = self.manifest.corpus
        schema = shard_schema(tuple(self.manifest.columns), corpus.sequence_columns)
        limit = self.manifest.tokenizer.vocab_size if corpus.largest_id is None else corpus.largest_id + 1
        return ShardReader(self.path / DATA, schema, limit)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id that occurs. Reads the whole set if its manifest does not record it.

        Raises:
            UserError: a shard is missing or damaged.
        """
        if (recorded := self.manifest.corpus.largest_id) is not None:
            return recorded
        tables = (self.read(shard, ["input_ids"], row_group) for shard, row_group in self.manifest.row_groups())
        return max((int(flat_values(table["input_ids"]).max(initial=0)) for table in tables), default=0)

    def fits_ids(self, size: int) -> bool:
        """Whether a model with embeddings for the ids below `size` can read the set.

        Raises:
            UserError: as for `largest_id`, which is needed only if the tokenizer has more ids.
        """
        return self.manifest.tokenizer.vocab_size <= size or self.largest_id < size

    def file(self, shard: int) -> ShardFile:
        """The file of a shard, for reading."""
        return self.reader.file(self.manifest.shards[shard])

    def read(self, shard: int, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
        """Read one shard, or one of its row groups, as an Arrow table.

        Raises:
            UserError: the shard is missing or damaged, or is not the one in the manifest.
        """
        return self.file(shard).read(columns, row_group)

    def sequences(self, columns: Sequence[str] | str | None = None) -> Iterator[TokenSequence]:
        """Iterate over all sequences in stored order, with one row group in memory.

        Args:
            columns: score and sequence columns to read; None reads all.

        Raises:
            UserError: the set lacks a column, or, while iterating, a shard is missing or damaged.
        """
        held = [*self.manifest.corpus.sequence_columns, *self.manifest.columns]
        named = [columns] if isinstance(columns, str) else columns
        wanted = held if named is None else list(dict.fromkeys(named))
        for name in wanted:
            if name not in held:
                raise UserError(f"{self.path}: has no column '{name}'; choose among {', '.join(held) or 'none'}")
        return self._iterate(wanted)

    def _iterate(self, columns: list[str]) -> Iterator[TokenSequence]:
        for shard, row_group in self.manifest.row_groups():
            table = self.read(shard, ["document_id", "start", "input_ids", *columns], row_group)
            yield from split_sequences(table, columns)

    def bytes_per_token(self) -> dict[str, float]:
        """Compressed bytes of each column per token, from the Parquet footers of at most `SAMPLED_FOOTERS` shards."""
        sizes = dict.fromkeys(self.reader.schema.names, 0)
        total = len(self.manifest.shards)
        sample = range(0, total, max(1, -(-total // SAMPLED_FOOTERS)))
        for shard in sample:
            metadata = self.file(shard).read_footer()
            for group in range(metadata.num_row_groups):
                for index, name in enumerate(sizes):  # each field has one column in the file
                    sizes[name] += metadata.row_group(group).column(index).total_compressed_size
        tokens = sum(self.manifest.shards[shard].tokens for shard in sample)
        return {name: size / max(1, tokens) for name, size in sizes.items()}

    def require_column(self, name: str) -> None:
        """Raise UserError unless the set has the score column `name`."""
        if name not in self.manifest.columns:
            held = ", ".join(self.manifest.columns) or "none"
            raise UserError(f"{self.path}: has no column '{name}' (score columns: {held}); add it with 'wmtp score'")

    def value_counts(self) -> dict[str, ValueCounts]:
        """Exact value counts of every score column, from `statistics.arrow`.

        Raises:
            UserError: the file is missing, or differs from the one in the manifest.
        """
        if self.manifest.statistics_sha256 is None:
            return {}
        file = self.path / STATISTICS
        most = most_table_bytes(self.manifest.columns)
        if not file.is_file():
            raise UserError(f"{file}: is missing; {RESTORE}")
        try:
            if file.stat().st_size > most:
                raise ValueError("too large")
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.manifest.statistics_sha256:
                raise UserError(f"{file}: content differs from the manifest; {RESTORE}")
            counts = from_table(read_arrow_table(content, TABLE_SCHEMA, most), self.manifest.columns)
        except (pa.ArrowException, LookupError, ValueError, OSError) as error:
            of_system = isinstance(error, OSError) and (error.errno is not None or error.__cause__)  # or of a store
            if of_system or lacks_memory(error):
                raise
            raise UserError(f"{file}: is damaged ({first_line(error)}); {RESTORE}") from error
        for name, column in self.manifest.columns.items():
            if counts[name].statistics() != column.statistics:
                raise UserError(f"{file}: value counts of '{name}' differ from the manifest; {RESTORE}")
        return counts


def find_foreign_entry(path: Location) -> str | None:
    """The fault of a set with a link that leads out of it, or with an entry that is neither file nor directory.

    Reading a pipe would never end. None if there is no such entry.
    """
    if not isinstance(path, Path):
        return None
    root = Path(os.path.realpath(path))
    for directory in filter(Path.is_dir, (path, path / DATA, path / TOKENIZER)):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_symlink() and root not in Path(os.path.realpath(entry.path)).parents:
                    return f"{entry.path}: is a link out of the shard set"
                if not (os.path.isfile(entry.path) or os.path.isdir(entry.path)):
                    return f"{entry.path}: is neither a file nor a directory"
    return None


def check_tokenizer(path: Location, tokenizer: TokenizerInfo) -> str | None:
    """The fault of the tokenizer's files in a set; None if they match its manifest."""
    small = all(size <= MOST_TOKENIZER_BYTES for size in list_files(path / TOKENIZER).values())
    same = small and directory_digest(path / TOKENIZER) == tokenizer.files_sha256
    return None if same else f"{path / TOKENIZER}: missing, or not the tokenizer of the corpus"


def finish_shard_set(output: Location, manifest: Manifest, value_counts: dict[str, ValueCounts]) -> ShardSet:
    """Write statistics, card and manifest into a directory with complete shards, and release its claim."""
    if value_counts:
        table = to_table(value_counts)
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with atomic_write(output / STATISTICS) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
        manifest = manifest.model_copy(update={"statistics_sha256": sha256_file(output / STATISTICS)})
    write_text(output / CARD, describe_set(manifest))
    fsync_tree(output / TOKENIZER)
    write_manifest(output, manifest)
    release_output(output)
    return ShardSet(output, manifest)


def find_finished(output: Location, request: str) -> ShardSet | None:
    """The finished shard set in `output` for the JSON text `request`, or None.

    Raises:
        UserError: the set is damaged, or belongs to another request.
    """
    if not (output / MANIFEST).exists():
        return None
    shards = ShardSet.open(output)
    check_request(output, shards.manifest, json.loads(request))
    return shards


def check_request(output: Location, manifest: Manifest, request: dict[str, Any]) -> None:
    """Raise UserError if the finished set in `output` belongs to another request than `request`."""
    if changed := differences(manifest.request, request):
        adds = all(name.startswith("columns.") for name in changed)
        remedy = (
            "to add columns to it, give it as --input with a new --output" if adds else "choose another or remove it"
        )
        raise UserError(
            f"--output {output}: holds a shard set with other inputs or settings ({', '.join(changed)}); {remedy}"
        )
