"""Reading and writing one Parquet shard: Arrow schema, encoding, row groups.

A row is one sequence: a contiguous span of one document. Sequence columns hold one document-level value per row.
Score columns are token-aligned lists of float16: entry i belongs to `input_ids[i]`. BYTE_STREAM_SPLIT groups the high
bytes of all values. They repeat often and compress well with zstd. Dictionaries and statistics would only add bytes.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Buffer

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.manifest import SequenceKind, ShardEntry
from weighted_mtp.schemas.storage.files import atomic_write
from weighted_mtp.schemas.storage.locations import Location

ROW_GROUP_TOKENS = 1 << 18
SCORE_TYPE = pa.list_(pa.field("element", pa.float16(), nullable=False))
IDS_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))
TOKEN_FIELDS = (
    pa.field("document_id", pa.string(), nullable=False),
    pa.field("start", pa.int64(), nullable=False),
    pa.field("input_ids", IDS_TYPE, nullable=False),
)
SEQUENCE_TYPES: dict[SequenceKind, pa.DataType] = {"number": pa.float32(), "label": pa.string()}
NO_COLUMNS: Mapping[str, SequenceKind] = {}


def shard_schema(
    score_columns: tuple[str, ...] = (), sequence_columns: Mapping[str, SequenceKind] = NO_COLUMNS
) -> pa.Schema:
    """Arrow schema of a shard: `document_id`, `start`, `input_ids`, then sequence columns, then score columns."""
    sequence_types = {name: SEQUENCE_TYPES[kind] for name, kind in sequence_columns.items()}
    others = sequence_types | dict.fromkeys(score_columns, SCORE_TYPE)
    return pa.schema([*TOKEN_FIELDS, *(pa.field(name, kind, nullable=False) for name, kind in others.items())])


def table_schema(table: pa.Table) -> pa.Schema:
    """Shard schema for the columns of a table."""
    others = list(table.schema)[len(TOKEN_FIELDS) :]
    scores = tuple(field.name for field in others if pa.types.is_list(field.type))
    kinds: dict[str, SequenceKind] = {
        field.name: "label" if pa.types.is_string(field.type) else "number"
        for field in others
        if field.name not in scores
    }
    return shard_schema(scores, kinds)


def shard_name(index: int, total: int) -> str:
    """File name of shard `index`, counted from 0, of `total`: `shard-00007-of-00032.parquet`."""
    return f"shard-{index:05d}-of-{total:05d}.parquet"


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """All entries of a list column, concatenated, as a numpy array [tokens]."""
    values = column.combine_chunks().flatten()
    return values.to_numpy(zero_copy_only=False)


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Length of every list of a list column, int64 [rows]."""
    lists = column.combine_chunks()
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)


def list_column(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """A list column from its entries [tokens] and list lengths [rows]; inverse of `flat_values` and `list_lengths`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def split_by_tokens(lengths: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Split rows into consecutive groups `(first row, end row)`. A group ends as soon as it holds `tokens` tokens."""
    first, held = 0, 0
    for row, length in enumerate(lengths.tolist()):
        held += length
        if held >= tokens:
            yield first, row + 1
            first, held = row + 1, 0
    if first < len(lengths):
        yield first, len(lengths)


class HashingFile(io.RawIOBase):
    """A write-only file that computes the size and the SHA-256 of the written data."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def write(self, data: Buffer) -> int:
        """Write, count and hash `data`."""
        data = memoryview(data).cast("B")
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_shard(path: Location, table: pa.Table) -> ShardEntry:
    """Write one shard atomically, in row groups of about 2**18 tokens, and return its manifest entry.

    Args:
        table: columns as in `shard_schema`, in that order.
    """
    lengths = list_lengths(table["input_ids"])
    schema = table_schema(table)
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    row_groups = list(split_by_tokens(lengths, ROW_GROUP_TOKENS))
    with atomic_write(path) as file:
        sink = HashingFile(file)
        with pq.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in ("start", *lists)],
            write_statistics=False,
            use_byte_stream_split=[f"{name}.list.element" for name in lists],
            write_page_checksum=True,
        ) as writer:
            for first, end in row_groups:
                writer.write_table(table.slice(first, end - first).cast(schema), row_group_size=end - first)
    return ShardEntry(
        name=path.name,
        rows=len(lengths),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        row_groups=len(row_groups),
        bytes=sink.size,
        sha256=sink.sha256.hexdigest(),
    )


def read_shard(path: Location, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
    """Read a shard, or one of its row groups, with page checksums verified.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    with _damage_reported(path), _open(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        return parquet.read(columns) if row_group is None else parquet.read_row_group(row_group, columns)


def read_footer(path: Location) -> pq.FileMetaData:
    """Read the Parquet metadata of a shard.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    with _damage_reported(path), _open(path) as file:
        return pq.read_metadata(file)


def _open(path: Location) -> Any:
    # Arrow requests exact ranges; reading ahead would fetch much more from a store.
    return pa.OSFile(str(path)) if isinstance(path, Path) else path.open("rb", cache_type="none")


@contextmanager
def _damage_reported(path: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: shard is missing; restore it or rewrite the set") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError) or error.__cause__:  # an error of the store: the shard may be intact
            raise
        raise UserError(f"{path}: shard is damaged ({first_line(error)}); restore it or rewrite the set") from error
