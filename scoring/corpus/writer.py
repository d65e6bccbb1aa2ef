"""Writing a token shard set: sequences into shards, rejected rows into a list."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import REJECTS
from weighted_mtp.schemas.shard_set.shards import list_lengths, shard_name, write_shard
from weighted_mtp.schemas.storage.files import PROGRESS, atomic_write, move
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.corpus.documents import Reject
from weighted_mtp.scoring.corpus.tokenization import EncodedBatch


class ShardWriter:
    """Collects sequences and writes a shard as soon as it holds `shard_tokens` tokens.

    Shards lie in `.progress/` until `finish`, because their names tell how many there are.
    """

    def __init__(self, output: Location, shard_tokens: int) -> None:
        self.output = output
        self.shard_tokens = shard_tokens
        self.entries: list[ShardEntry] = []
        self.held: list[pa.Table] = []
        self.held_tokens = 0

    def add(self, table: pa.Table) -> None:
        """Add sequences, in corpus order."""
        lengths = list_lengths(table["input_ids"])
        while True:
            ends = self.held_tokens + np.cumsum(lengths)
            rows = int(np.searchsorted(ends, self.shard_tokens)) + 1
            if rows > len(lengths):
                break
            self._hold(table.slice(0, rows), int(ends[rows - 1]))
            self._write()
            table, lengths = table.slice(rows), lengths[rows:]
        if len(lengths):
            self._hold(table, int(ends[-1]))

    def finish(self) -> list[ShardEntry]:
        """Write what is left, give every shard its final name, and describe them."""
        if self.held:
            self._write()
        total = len(self.entries)
        for index, entry in enumerate(self.entries):
            final = shard_name(index, total)
            move(self.output / PROGRESS / entry.name, self.output / final)
            self.entries[index] = replace(entry, name=final)
        return self.entries

    def _hold(self, table: pa.Table, tokens: int) -> None:
        self.held.append(table)
        self.held_tokens = tokens

    def _write(self) -> None:
        path = self.output / PROGRESS / f"shard-{len(self.entries):05d}.parquet"
        self.entries.append(write_shard(path, pa.concat_tables(self.held)))
        self.held, self.held_tokens = [], 0


@dataclass
class Tally:
    """What was read so far. `rejects` counts by kind; `examples` holds the first reject of each kind."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Reject] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """Rows that were rejected."""
        return sum(self.rejects.values())

    def add(self, batch: EncodedBatch) -> None:
        """Count a batch."""
        self.documents += batch.documents
        self.sequences += batch.table.num_rows
        self.tokens += batch.tokens
        self.text_bytes += batch.text_bytes
        for reject in batch.rejects:
            self.rejects[reject.kind] = self.rejects.get(reject.kind, 0) + 1
            self.examples.setdefault(reject.kind, reject)


def write_shards(
    output: Location, batches: Iterable[EncodedBatch], shard_tokens: int
) -> tuple[list[ShardEntry], Tally]:
    """Write all sequences, and `rejects.jsonl` if rows were rejected, into the claimed directory `output`.

    Raises:
        UserError: there was not one document.
    """
    writer, tally = ShardWriter(output, shard_tokens), Tally()
    with atomic_write(output / PROGRESS / REJECTS) as rejects:
        for batch in batches:
            writer.add(batch.table)
            tally.add(batch)
            for reject in batch.rejects:
                rejects.write(json.dumps(reject._asdict()).encode() + b"\n")
    if not tally.documents:
        raise UserError(why_empty(tally))
    if tally.rejected:
        move(output / PROGRESS / REJECTS, output / REJECTS)
    entries = writer.finish()
    assert sum(entry.tokens for entry in entries) == tally.tokens
    return entries, tally


def why_empty(tally: Tally) -> str:
    """Why a corpus gave no document."""
    if not tally.rejected:
        return "--input: holds no rows; check that the files are not empty"
    kind = max(tally.rejects, key=lambda kind: tally.rejects[kind])
    first = tally.examples[kind]
    return (
        f"--input: all {tally.rejected:,} rows were rejected, {tally.rejects[kind]:,} of them as "
        f"{first.source} row {first.row}: {first.reason}; check --text_field, --id_field, "
        "--number_fields, --label_fields and --format"
    )
