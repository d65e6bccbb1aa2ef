"""Reading and writing one Parquet shard: Arrow schema, encoding, row groups.

A row is one sequence: a contiguous span of one document. Sequence columns hold one document-level value per row.
Score columns are token-aligned lists: entry i belongs to `input_ids[i]`.

Scores are float16 values (see `schemas.shard_set.rounding`) in float32. BYTE_STREAM_SPLIT groups the bytes of equal
rank of all values. The high ones repeat often and the low ones are mostly 0, so compressed they are only a little
larger than float16. Dictionaries and statistics would only add bytes.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import Buffer

from weighted_mtp.schemas.errors import UserError, first_line, lacks_memory
from weighted_mtp.schemas.shard_set.manifest import ROW_GROUP_TOKENS, TOKEN_COLUMNS, SequenceKind, ShardEntry
from weighted_mtp.schemas.storage.files import atomic_write
from weighted_mtp.schemas.storage.locations import Location

RESTORE = "restore it or rewrite the set"
ZSTD_LEVEL = 1
"""Levels up to 15 save at most 1 % of a score, at a fraction of the speed (benchmarks/storage.py)."""
FOOTER_READ = 1 << 16
"""Bytes at the end of a file to read first; they contain the footer of most shards."""
CONTENT_DIGEST = b"content_sha256"
"""Key in the footer for the SHA-256 of all bytes before it."""
SCORE_TYPE = pa.list_(pa.field("element", pa.float32(), nullable=False))
IDS_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))
TOKEN_TYPES = (pa.string(), pa.int64(), IDS_TYPE)
TOKEN_FIELDS = tuple(pa.field(*column, nullable=False) for column in zip(TOKEN_COLUMNS, TOKEN_TYPES, strict=True))
SEQUENCE_TYPES: dict[SequenceKind, pa.DataType] = {"number": pa.float32(), "label": pa.string()}
MOST_TEXT_BYTES = 1 << 16
"""Longest document id or label, as UTF-8."""
MOST_GROUP_BYTES = 1 << 28
"""Largest column of ids or labels in a row group, decompressed. A dictionary of few long texts can stand for more."""
NO_COLUMNS: Mapping[str, SequenceKind] = {}


def shard_schema(
    score_columns: tuple[str, ...] = (), sequence_columns: Mapping[str, SequenceKind] = NO_COLUMNS
) -> pa.Schema:
    """Arrow schema of a shard file: `document_id`, `start`, `input_ids`, then sequence columns, then score columns."""
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
    return _one_array(column).flatten().to_numpy(zero_copy_only=False)


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Length of every list of a list column, int64 [rows]."""
    return np.diff(_one_array(column).offsets.to_numpy()).astype(np.int64)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which always copies


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of strings, perhaps of a dictionary."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def text_sizes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Bytes of each string of a column as UTF-8, int64 [rows]; 0 for null. A dictionary is not decoded."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *map(text_sizes, column.chunks)])
    if pa.types.is_dictionary(column.type):
        sizes = pa.array(text_sizes(column.dictionary)).take(column.indices)
    elif pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        # Arrow does not measure views. The size is the first of four numbers.
        return np.frombuffer(column.buffers()[1], np.int32)[::4][column.offset :][: len(column)].astype(np.int64)
    else:
        sizes = pc.binary_length(column)
    return sizes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


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
        table: columns as in `shard_schema`, in that order, with scores that are float16 values.
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
            compression_level=ZSTD_LEVEL,
            use_dictionary=[name for name in schema.names if name not in ("start", *lists)],
            write_statistics=False,
            use_byte_stream_split=[f"{name}.list.element" for name in lists],
            write_page_checksum=True,
        ) as writer:
            for first, end in row_groups:
                rows = table.slice(first, end - first).cast(schema)
                for name in schema.names:
                    if pa.types.is_string(rows[name].type) and text_sizes(rows[name]).sum() > MOST_GROUP_BYTES:
                        raise UserError(f"{path}: '{name}' is too long for a shard; use shorter ids or labels")
                writer.write_table(rows, row_group_size=end - first)
            writer.add_key_value_metadata({CONTENT_DIGEST: sink.sha256.hexdigest()})
        footer = footer_bytes(file, sink.size)
    return ShardEntry(
        name=path.name,
        rows=len(lengths),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        row_groups=len(row_groups),
        bytes=sink.size,
        sha256=sink.sha256.hexdigest(),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
    )


def footer_bytes(file: BinaryIO, size: int) -> bytes:
    """The footer of an open Parquet file of `size` bytes, with its length and the closing magic number."""
    file.seek(max(0, size - FOOTER_READ))
    end = file.read(FOOTER_READ)
    length = int.from_bytes(end[-8:-4], "little") + 8
    if not 12 <= length <= size:
        raise pa.ArrowInvalid("no Parquet footer")
    if length > len(end):
        file.seek(size - length)
        end = file.read(length)
    return end[-length:]


@dataclass(frozen=True)
class ShardReader:
    """What the shards of a set have in common, for reading them.

    Attributes:
        directory: location of the files.
        schema: Arrow schema of the files.
        id_limit: all token ids are below this number.
    """

    directory: Location
    schema: pa.Schema
    id_limit: int

    @cached_property
    def texts(self) -> dict[int, str]:
        """Number and name of each column of strings."""
        return {index: field.name for index, field in enumerate(self.schema) if pa.types.is_string(field.type)}

    def file(self, entry: ShardEntry) -> "ShardFile":
        """The shard with this entry in the manifest."""
        return ShardFile(self, entry)


@dataclass(frozen=True)
class ShardFile:
    """A shard as the manifest describes it, for reading."""

    reader: ShardReader
    entry: ShardEntry

    @property
    def path(self) -> Location:
        """Location of the file."""
        return self.reader.directory / self.entry.name

    def read(self, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
        """Read the shard, or one of its row groups.

        Compares size, footer and schema with the manifest, verifies page checksums, and checks lengths and token ids.

        Raises:
            UserError: the file is missing, truncated or damaged, or is not the one in the manifest.
        """
        with self._damage_reported(), _open(self.path) as file, self._parquet(file) as parquet:
            table = parquet.read(columns) if row_group is None else parquet.read_row_group(row_group, columns)
            groups = parquet.num_row_groups if row_group is None else 1
            table = self._decode_texts(table, groups)
        self.check(table)
        return table

    def read_hashed(self) -> pa.Table:
        """Read the whole shard after comparing its SHA-256 with the manifest.

        Raises:
            UserError: as for `read`.
        """
        with self._damage_reported():
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.entry.sha256:
                raise self._fault("content differs from the manifest")
            with self._parquet(pa.BufferReader(content)) as parquet:
                table = self._decode_texts(parquet.read(), parquet.num_row_groups)
        self.check(table)
        return table

    def read_footer(self) -> pq.FileMetaData:
        """Read and check the Parquet metadata.

        Raises:
            UserError: as for `read`.
        """
        with self._damage_reported(), _open(self.path) as file:
            return self._footer(file)

    def _parquet(self, file: Any) -> pq.ParquetFile:
        texts = list(self.reader.texts.values())
        return pq.ParquetFile(file, metadata=self._footer(file), page_checksum_verification=True, read_dictionary=texts)

    def _decode_texts(self, table: pa.Table, groups: int) -> pa.Table:
        """The table with the schema of the set: strings in place of dictionaries, and no metadata of the file.

        Raises:
            UserError: the strings do not fit into memory.
        """
        columns = []
        for name, column in zip(table.schema.names, table.columns, strict=True):
            if pa.types.is_dictionary(column.type):
                if text_sizes(column).sum() > groups * MOST_GROUP_BYTES:
                    raise self._fault(f"'{name}' is too large")
                column = column.cast(pa.string())
            columns.append(column)
        fields = [self.reader.schema.field(name) for name in table.schema.names]
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))

    def _footer(self, file: Any) -> pq.FileMetaData:
        size = file.seek(0, io.SEEK_END)
        if size != self.entry.bytes:
            raise self._fault(f"shard has {size} bytes instead of {self.entry.bytes} (truncated or replaced)")
        footer = footer_bytes(file, size)
        if hashlib.sha256(footer).hexdigest() != self.entry.footer_sha256:
            raise self._fault("content differs from the manifest")
        metadata = pq.read_metadata(pa.BufferReader(footer))
        if not metadata.schema.to_arrow_schema().equals(self.reader.schema):
            raise self._fault("columns differ from the manifest")
        ids = self.reader.schema.get_field_index("input_ids")
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        tokens = sum(group.column(ids).num_values for group in groups)
        if (metadata.num_rows, len(groups), tokens) != (self.entry.rows, self.entry.row_groups, self.entry.tokens):
            raise self._fault("the numbers of rows, row groups and tokens differ from the manifest")
        if not all(group.num_rows > 0 for group in groups):
            raise self._fault("has an empty row group")
        for index, name in self.reader.texts.items():
            if any(group.column(index).total_uncompressed_size > 2 * MOST_GROUP_BYTES for group in groups):
                raise self._fault(f"'{name}' is too large")
        return metadata

    def check(self, table: pa.Table) -> None:
        """Check lengths, token ids, numbers and strings of a table read from this file, which may lack columns.

        Raises:
            UserError: a list is not as long as `input_ids`, too long or empty, or a value is out of range.
        """
        if not table.num_rows:
            return
        columns = dict(zip(table.schema.names, table.columns, strict=True))
        lengths = list_lengths(columns["input_ids"]) if "input_ids" in columns else None
        if lengths is not None:
            ids = flat_values(columns["input_ids"])
            if not 1 <= lengths.min() <= lengths.max() <= self.entry.longest:
                raise self._fault("has a sequence of a length that the manifest excludes")
            if not 0 <= ids.min() <= ids.max() < self.reader.id_limit:
                raise self._fault(f"has a token id outside the range 0 to {self.reader.id_limit - 1:,}")
        for name, column in columns.items():
            if column.type == SCORE_TYPE:
                if lengths is not None and not np.array_equal(list_lengths(column), lengths):
                    raise self._fault(f"'{name}' is not as long as input_ids in every row")
            elif pa.types.is_float32(column.type) and not np.isfinite(column.to_numpy()).all():
                raise self._fault(f"'{name}' is not finite in every row")
            elif pa.types.is_string(column.type):
                try:
                    column.validate(full=True)
                except pa.ArrowInvalid as error:
                    raise self._fault(f"'{name}' has a row that is not UTF-8") from error
                if text_sizes(column).max() > MOST_TEXT_BYTES:
                    raise self._fault(f"'{name}' has a row of more than {MOST_TEXT_BYTES:,} bytes")
        if "start" in columns and columns["start"].to_numpy().min() < 0:
            raise self._fault("'start' is negative in a row")

    def _fault(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}; {RESTORE}")

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: shard is missing; {RESTORE}") from error
        except (pa.ArrowException, ValueError, OSError) as error:
            if isinstance(error, PermissionError) or error.__cause__ or lacks_memory(error):  # the shard may be intact
                raise
            raise UserError(f"{self.path}: shard is damaged ({first_line(error)}); {RESTORE}") from error


def _open(path: Location) -> Any:
    # Arrow requests exact ranges; reading ahead would fetch much more from a store.
    return pa.OSFile(str(path)) if isinstance(path, Path) else path.open("rb", cache_type="none")
