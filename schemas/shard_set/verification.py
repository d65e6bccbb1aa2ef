"""Verifying a shard set: every file and every value against the manifest."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.manifest import Manifest
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_VALUES, float16_bits
from weighted_mtp.schemas.shard_set.shard_set import STATISTICS, ShardSet, check_tokenizer, find_foreign_entry
from weighted_mtp.schemas.shard_set.shards import RESTORE, ShardFile, flat_values, list_lengths
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER, sha256_file
from weighted_mtp.schemas.storage.locations import Location, join, walk_files


class FileCheck(NamedTuple):
    """Result of `verify` for one file: its size in the manifest, and one line about its fault, or None."""

    name: str
    bytes: int
    fault: str | None


def verify(path: Location, manifest: Manifest) -> Iterator[FileCheck]:
    """Compare every shard, the tokenizer and the statistics with the manifest; continue after a fault.

    Shards are compared by digest and by content: schema, lengths, ids, and the value counts of scores.

    Raises:
        UserError: the set has a link that leads out of it, or an entry that is no file.
    """
    if fault := find_foreign_entry(path):
        raise UserError(f"{fault}; {RESTORE}")
    shards = ShardSet(path, manifest)
    found = {name: ValueCounts() for name in manifest.columns}
    damaged = False
    for number, entry in enumerate(manifest.shards):
        fault = check_shard(shards.file(number), found)
        damaged |= fault is not None
        yield FileCheck(entry.name, entry.bytes, fault)
    known = {entry.name for entry in manifest.shards}
    for name, size in sorted(walk_files(path / DATA).items()):
        if name not in known:  # readers of data/*.parquet would read it
            yield FileCheck(name, size, f"{join(path / DATA, name)}: is no shard of the manifest")
    yield FileCheck(TOKENIZER, 0, check_tokenizer(path, manifest.tokenizer))
    if manifest.statistics_sha256 is not None:
        yield FileCheck(STATISTICS, 0, check_statistics(shards, None if damaged else found))


def check_shard(file: ShardFile, counts: dict[str, ValueCounts]) -> str | None:
    """The fault of a shard; None if it is as its entry says. Adds its scores to `counts`."""
    rows = tokens = longest = 0
    try:
        if file.path.stat().st_size != file.entry.bytes or sha256_file(file.path) != file.entry.sha256:
            return f"{file.path}: content differs from the manifest (sha256)"
        for group in range(file.read_footer().num_row_groups):
            table = file.read(row_group=group)
            lengths = list_lengths(table["input_ids"])
            rows, tokens, longest = rows + len(lengths), tokens + lengths.sum(), max(longest, lengths.max(initial=0))
            for name, of_column in counts.items():
                values = flat_values(table[name])
                if not np.array_equal(values, FLOAT16_VALUES[float16_bits(values)], equal_nan=True):
                    return f"{file.path}: '{name}' has a value that is no float16"
                of_column.add(values)
    except UserError as error:
        return without_remedy(error)
    except FileNotFoundError:
        return f"{file.path}: missing"
    except (pa.ArrowException, OSError) as error:
        return f"{file.path}: cannot be read ({first_line(error)})"
    if (rows, tokens, longest) != (file.entry.rows, file.entry.tokens, file.entry.longest):
        return f"{file.path}: its rows, tokens or longest sequence differ from the manifest"
    return None


def without_remedy(error: UserError) -> str:
    """The message of an error of a reader, without what to do: `verify` lists many faults."""
    return str(error).removesuffix(f"; {RESTORE}")


def check_statistics(shards: ShardSet, found: dict[str, ValueCounts] | None) -> str | None:
    """The fault of the statistics; None if they match the manifest, and the counts found in the shards if given."""
    try:
        stored = shards.value_counts()
    except UserError as error:
        return without_remedy(error)
    for name, counts in (found or {}).items():
        if not np.array_equal(counts.counts, stored[name].counts):
            return f"{shards.path / STATISTICS}: value counts of '{name}' are not those of the shards"
    return None
