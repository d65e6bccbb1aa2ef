"""Opening, verifying and finishing shard sets."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest
from weighted_mtp.schemas.shard_set.manifest import Manifest, read_manifest, write_manifest
from weighted_mtp.schemas.shard_set.shards import read_footer, read_shard, shard_schema
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts, from_table, to_table
from weighted_mtp.schemas.storage.claims import release_output
from weighted_mtp.schemas.storage.files import (
    MANIFEST,
    TOKENIZER,
    atomic_write,
    differences,
    fsync_tree,
    sha256_file,
)
from weighted_mtp.schemas.storage.locations import Location, list_files, locate

STATISTICS = "statistics.parquet"
REJECTS = "rejects.jsonl"
SAMPLED_FOOTERS = 256
"""Most footers read to measure column sizes, from evenly spaced shards. Each costs requests to an object store."""


@dataclass(frozen=True)
class ShardSet:
    """A finished shard set: a directory and the manifest that describes it."""

    path: Location
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Location) -> "ShardSet":
        """Open a shard set. Checks the manifest, the tokenizer, and the size of every shard.

        Raises:
            UserError: not a finished shard set, an edited manifest, another tokenizer, a missing or truncated shard.
        """
        path = locate(path)
        manifest = read_manifest(path)
        sizes = list_files(path)
        for shard in manifest.shards:
            size = sizes.get(shard.name)
            if size is None:
                raise UserError(f"{path / shard.name}: shard is missing; restore it or rewrite the set")
            if size != shard.bytes:
                raise UserError(
                    f"{path / shard.name}: shard has {size} bytes instead of {shard.bytes} (truncated or replaced); "
                    "restore it or rewrite the set"
                )
        if fault := check_tokenizer(path, manifest):
            raise UserError(f"{fault}; restore it or rewrite the set")
        return cls(path, manifest)

    @property
    def tokenizer_path(self) -> Location:
        """Directory of the corpus's tokenizer."""
        return self.path / TOKENIZER

    def read(self, shard: int, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
        """Read one shard, or one of its row groups, as an Arrow table."""
        return read_shard(self.path / self.manifest.shards[shard].name, columns, row_group)

    def bytes_per_token(self) -> dict[str, float]:
        """Compressed bytes of each column per token, from the Parquet footers of at most `SAMPLED_FOOTERS` shards."""
        sizes = dict.fromkeys(manifest_schema(self.manifest).names, 0)
        shards = self.manifest.shards
        sample = shards[:: max(1, -(-len(shards) // SAMPLED_FOOTERS))]
        for shard in sample:
            metadata = read_footer(self.path / shard.name)
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    chunk = metadata.row_group(group).column(index)
                    sizes[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
        tokens = sum(shard.tokens for shard in sample)
        return {name: size / max(1, tokens) for name, size in sizes.items()}

    def require_column(self, name: str) -> None:
        """Raise UserError unless the set has the score column `name`."""
        if name not in self.manifest.columns:
            held = ", ".join(self.manifest.columns) or "none"
            raise UserError(f"{self.path}: has no column '{name}' (score columns: {held}); add it with 'wmtp score'")

    def value_counts(self) -> dict[str, ValueCounts]:
        """Exact value counts of every score column, from `statistics.parquet`.

        Raises:
            UserError: the file is missing, or differs from the one in the manifest.
        """
        if self.manifest.statistics_sha256 is None:
            return {}
        file = self.path / STATISTICS
        if not file.exists() or sha256_file(file) != self.manifest.statistics_sha256:
            raise UserError(f"{file}: missing or altered; restore it or rewrite the set")
        with file.open("rb") as content:
            return from_table(pq.read_table(content))


class FileCheck(NamedTuple):
    """Result of `verify` for one file: its size in the manifest, and one line about its fault, or None."""

    name: str
    bytes: int
    fault: str | None


def verify(path: Location, manifest: Manifest) -> Iterator[FileCheck]:
    """Compare every shard, the tokenizer and the statistics with the manifest, byte by byte; continue after a fault."""
    schema = manifest_schema(manifest)
    for shard in manifest.shards:
        fault = check_content(path / shard.name, shard.sha256)
        if fault is None and not read_footer(path / shard.name).schema.to_arrow_schema().equals(schema):
            fault = f"{path / shard.name}: columns differ from the manifest"
        yield FileCheck(shard.name, shard.bytes, fault)
    yield FileCheck(TOKENIZER, 0, check_tokenizer(path, manifest))
    if manifest.statistics_sha256 is not None:
        yield FileCheck(STATISTICS, 0, check_content(path / STATISTICS, manifest.statistics_sha256))


def manifest_schema(manifest: Manifest) -> pa.Schema:
    """Arrow schema of the shards of a manifest."""
    return shard_schema(tuple(manifest.columns), manifest.corpus.sequence_columns)


def check_tokenizer(path: Location, manifest: Manifest) -> str | None:
    """The fault of the tokenizer's files; None if they match the manifest."""
    same = directory_digest(path / TOKENIZER) == manifest.tokenizer.files_sha256
    return None if same else f"{path / TOKENIZER}: missing, or not the tokenizer of the corpus"


def check_content(file: Location, sha256: str) -> str | None:
    """The fault of `file`; None if its SHA-256 matches."""
    try:
        return None if sha256_file(file) == sha256 else f"{file}: content differs from the manifest (sha256)"
    except FileNotFoundError:
        return f"{file}: missing"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror or first_line(error)})"


def finish_shard_set(output: Location, manifest: Manifest, value_counts: dict[str, ValueCounts]) -> ShardSet:
    """Write statistics and manifest into a directory with complete shards, and release its claim."""
    if value_counts:
        with atomic_write(output / STATISTICS) as file:
            pq.write_table(to_table(value_counts), file, compression="zstd")
        manifest = manifest.model_copy(update={"statistics_sha256": sha256_file(output / STATISTICS)})
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
    if changed := differences(shards.manifest.request, json.loads(request)):
        adds = all(name.startswith("columns.") for name in changed)
        remedy = (
            "to add columns to it, give it as --input with a new --output" if adds else "choose another or remove it"
        )
        raise UserError(
            f"--output {output}: holds a shard set with other inputs or settings ({', '.join(changed)}); {remedy}"
        )
    return shards
