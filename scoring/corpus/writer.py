"""Writing a token shard set: sequences into shards, rejected rows into `rejects.jsonl`."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import REJECTS
from weighted_mtp.schemas.shard_set.shards import list_lengths, shard_name, write_shard
from weighted_mtp.schemas.storage.files import DATA, PROGRESS, atomic_write, move
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.corpus.documents import RejectedDocument
from weighted_mtp.scoring.corpus.repeated_ids import SeenHashes
from weighted_mtp.scoring.corpus.tokenization import EncodedBatch


class ShardWriter:
    """Collects sequences and writes a shard as soon as it holds `shard_tokens` tokens.

    Shards stay in `.progress/` until `finish`, because their names contain the number of shards.
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
        """Write the remaining sequences, give every shard its final name, and describe the shards."""
        if self.held:
            self._write()
        total = len(self.entries)
        (self.output / DATA).mkdir()
        for index, entry in enumerate(self.entries):
            final = shard_name(index, total)
            move(self.output / PROGRESS / entry.name, self.output / DATA / final)
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
class CorpusCounts:
    """Running totals of a corpus.

    Attributes:
        documents: documents with at least one token.
        sequences: rows of the shards.
        tokens: tokens of the shards.
        text_bytes: size of the texts as UTF-8.
        largest_id: largest token id.
        rejects: number of rejected rows by kind.
        examples: first rejected row of each kind.
        double_bos: documents whose first two tokens are BOS.
        with_special_tokens: documents whose text contains the string of a special token.
        files: files of the corpus, also those not yet read.
        left_out: names of files beside them that are not read.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest_id: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    examples: dict[str, RejectedDocument] = field(default_factory=dict)
    double_bos: int = 0
    with_special_tokens: int = 0
    files: int = 0
    left_out: Sequence[str] = ()

    @property
    def rejected(self) -> int:
        """Number of rejected rows."""
        return sum(self.rejects.values())

    def add(self, batch: EncodedBatch) -> None:
        """Count a batch."""
        self.documents += len(batch.documents)
        self.sequences += batch.table.num_rows
        self.tokens += int(batch.documents["tokens"].sum())
        self.text_bytes += int(batch.documents["text_bytes"].sum())
        self.double_bos += int(batch.documents["double_bos"].sum())
        self.with_special_tokens += int(batch.documents["with_special_tokens"].sum())
        if batch.table.num_rows:
            self.largest_id = max(self.largest_id, pc.max(pc.list_flatten(batch.table["input_ids"])).as_py())
        for reject in batch.rejects:
            self.rejects[reject.kind] = self.rejects.get(reject.kind, 0) + 1
            self.examples.setdefault(reject.kind, reject)


def write_shards(
    output: Location,
    batches: Iterable[EncodedBatch],
    shard_tokens: int,
    counts: CorpusCounts,
    report: Callable[[CorpusCounts], None],
    *,
    given_ids: bool = False,
) -> list[ShardEntry]:
    """Write all sequences, and `rejects.jsonl` if rows were rejected, into the claimed directory `output`.

    Adds every batch to `counts` and calls `report` with them. Ids that are a field of the corpus (`given_ids`) may be
    repeated: then all documents but the first are rejected.

    Raises:
        UserError: the corpus has no document.
    """
    writer = ShardWriter(output, shard_tokens)
    seen = SeenHashes()
    with atomic_write(output / PROGRESS / REJECTS) as rejects:
        for batch in batches:
            if given_ids and (repeated := seen.add(batch.documents["id_hash"])).any():
                batch = batch.without_repeated(repeated)
            writer.add(batch.table)
            counts.add(batch)
            for reject in batch.rejects:
                rejects.write(json.dumps(reject._asdict()).encode() + b"\n")
            report(counts)
    if not counts.documents:
        raise UserError(why_empty(counts))
    if counts.rejected:
        move(output / PROGRESS / REJECTS, output / REJECTS)
    entries = writer.finish()
    assert sum(entry.tokens for entry in entries) == counts.tokens
    return entries


def why_empty(counts: CorpusCounts) -> str:
    """Error message for a corpus without documents."""
    if not counts.rejected:
        return "--input: holds no rows; check that the files are not empty"
    kind = max(counts.rejects, key=lambda kind: counts.rejects[kind])
    first = counts.examples[kind]
    remedy = "check --text_field, --id_field, --number_fields, --label_fields, --format and --max_document_bytes"
    if kind in ("invalid JSON", "not an object"):
        remedy = "write one object on each line, or one array into a file named .json"
    return (
        f"--input: all {counts.rejected:,} rows were rejected, {counts.rejects[kind]:,} of them for the same reason as "
        f"row {first.row} of {first.source} ({first.reason}); {remedy}"
    )
