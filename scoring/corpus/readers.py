"""Reading a corpus: from a source to numbered rows, and from rows to batches of bounded size.

A row is a line of JSON (bytes), a record (dict of JSON or Arrow values), or a `MalformedRow`. Readers do not check
rows, so a bad row affects only itself; `scoring.corpus.documents` checks them. Rows that are too large to hold are read
in pieces and become `MalformedRow`s.

Files are read with pyarrow and the standard library. The builders of `datasets` (5.2) are used for the hub only: on
local files they accept a truncated `.zst`, find no rows in a file with brackets in its name, ignore the encoding of
compressed files, read the text "NA" in a CSV as missing, and drop a block of JSON because of one bad line.
"""

import csv
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from weighted_mtp.schemas.configs.prepare import MAX_DOCUMENT_BYTES
from weighted_mtp.schemas.errors import UserError, first_line, lacks_memory
from weighted_mtp.schemas.shard_set.shards import is_text, text_sizes
from weighted_mtp.schemas.storage.compression import DAMAGE, data_suffix, open_stream
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.corpus.documents import Fields, MalformedRow, Row, RowBatch, json_object, too_large
from weighted_mtp.scoring.corpus.pieces import JsonArray, bounded_lines, bounded_whole, paragraphs
from weighted_mtp.scoring.corpus.source_files import CorpusFile, HubSplit, Source

SampleBy = Literal["document", "paragraph", "line"]
BATCH_ROWS = 1024
BATCH_BYTES = 1 << 20
ARROW_ROWS = 256
ARROW_BYTES = 1 << 26
"""Bytes of Parquet decoded at once, unless a row has more. Smaller row groups are always read."""
ROW_FACTOR = 4
"""Largest row that is held, in units of the largest document: JSON in ASCII has up to three bytes for one of text."""
FOREIGN_STARTS = {
    b"\xff\xfe": "in UTF-16, not in UTF-8",
    b"\xfe\xff": "in UTF-16, not in UTF-8",
    b"\x1f\x8b": "compressed, and its name does not end with .gz",
    b"\x28\xb5\x2f\xfd": "compressed, and its name does not end with .zst",
    b"\xfd7zXZ\0": "compressed, and its name does not end with .xz",
    b"version https://git-lfs.github.com/": "a pointer of Git LFS, whose content 'git lfs pull' fetches",
}
"""Starts of files that are no text or JSON in UTF-8, and what these are."""
BINARY_TYPES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def read_batches(
    sources: Iterable[Source],
    fields: Fields,
    sample_by: SampleBy = "document",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[RowBatch]:
    """Read the sources in order, in batches of at most 1024 rows and about one megabyte of text.

    Args:
        sources: files and datasets, in reading order.
        fields: required fields of a record.
        sample_by: unit of a text file that forms a document.
        max_document_bytes: largest document. Rows of more than `ROW_FACTOR` times as many bytes are not held.

    Raises:
        UserError: a source cannot be read to its end; the message names it.
    """
    for source in sources:
        rows: list[tuple[int, Row]] = []
        size = 0
        for number, row in read_rows(source, fields, sample_by, max_document_bytes):
            rows.append((number, row))
            size += row_size(row, fields.text)
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                yield RowBatch(source.name, rows)
                rows, size = [], 0
        if rows:
            yield RowBatch(source.name, rows)


def too_large_row(most: int) -> MalformedRow:
    """A row of more than `most` bytes, which was not held."""
    return MalformedRow(f"row larger than {most:,} bytes ({ROW_FACTOR} times --max_document_bytes)")


def row_size(row: Row, text_field: str) -> int:
    """Approximate size of the text in a row, in bytes."""
    text = row.get(text_field) if isinstance(row, dict) else row
    return len(text) if isinstance(text, (str, bytes)) else 0


def read_rows(
    source: Source, fields: Fields, sample_by: SampleBy, max_document_bytes: int
) -> Iterator[tuple[int, Row]]:
    """Rows of one source, numbered from 0 by line for JSON and text, without blank lines, else by record."""
    where = source.path if isinstance(source, CorpusFile) else source.name
    most = ROW_FACTOR * max_document_bytes
    try:
        if isinstance(source, HubSplit):
            yield from enumerate(read_hub(source, fields.required, most))
        elif source.format == "json":
            yield from read_json(source.path, fields.required, most)
        elif source.format == "text":
            for number, text in read_text(source.path, sample_by, max_document_bytes):
                yield number, MalformedRow(too_large(max_document_bytes)) if text is None else {fields.text: text}
        elif source.format == "csv":
            yield from enumerate(read_csv(source.path, fields, most))
        else:
            read = read_parquet if source.format == "parquet" else read_arrow
            yield from enumerate(read(source.path, fields.required, most))
    except (*DAMAGE, DatasetsError) as error:
        of_store = isinstance(error, OSError) and error.__cause__ is not None
        if of_store or lacks_memory(error):
            raise
        kind = f" as {source.format}" if isinstance(source, CorpusFile) else ""
        raise UserError(f"{where}: cannot be read{kind} ({first_line(error)}); repair it or leave it out") from error


def open_text(path: Location) -> io.BufferedReader:
    """Open a file as `open_stream` does.

    Raises:
        ValueError: it is something else from the start; what it is.
    """
    stream = open_stream(path)
    for start, what in FOREIGN_STARTS.items():
        if stream.peek(len(start)).startswith(start):
            stream.close()
            raise ValueError(f"it is {what}")
    return stream


def read_json(path: Location, fields: list[str], most: int) -> Iterator[tuple[int, Row]]:
    """Lines of JSON, or the elements of a file that is one JSON array."""
    with open_text(path) as stream:
        if data_suffix(path) == ".json" and stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
                yield from enumerate(JsonArray(text, most, partial(json_object, fields)))
            return
        for number, line in bounded_lines(stream, most):
            if number == 0 and line is not None:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line is None:
                yield number, too_large_row(most)
            elif line and not line.isspace():
                yield number, line


def read_text(path: Location, sample_by: SampleBy, most: int) -> Iterator[tuple[int, str | None]]:
    """Documents of a text file: the whole file, its lines, or its paragraphs, separated by blank lines.

    A document of more than `most` characters is None.
    """
    with open_text(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n") as stream:
        if sample_by == "document":
            yield 0, bounded_whole(stream, most)
        elif sample_by == "line":
            for number, line in bounded_lines(stream, most):
                if line is None or not line.isspace():
                    yield number, line and line.rstrip("\r\n")
        else:
            yield from enumerate(paragraphs((line for _, line in bounded_lines(stream, most)), most))


class CsvLines:
    """Lines of a CSV file for its parser, which holds a record until it is complete.

    Attributes:
        size: characters of the record so far; set to 0 after each record.
    """

    def __init__(self, stream: io.TextIOWrapper, most: int) -> None:
        self.lines = bounded_lines(stream, most)
        self.most = most
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        """The lines.

        Raises:
            ValueError: a record has more than `most` characters.
        """
        for number, line in self.lines:
            self.size += self.most + 1 if line is None else len(line)
            if line is None or self.size > self.most:
                raise ValueError(
                    f"the record at line {number + 1:,} has more than {self.most:,} characters, perhaps because of an "
                    "unclosed quote"
                )
            yield line


def read_csv(path: Location, fields: Fields, most: int) -> Iterator[Row]:
    """Records of a CSV or TSV file with a header. No value is read as missing.

    All values are strings, except numbers in the columns `fields.numbers`.
    """
    csv.field_size_limit(sys.maxsize)
    with (
        open_text(path) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream,
    ):
        lines = CsvLines(stream, most)
        reader = csv.reader(lines, delimiter="\t" if data_suffix(path) == ".tsv" else ",", strict=True)
        header = next(filter(None, reader), [])  # after blank lines
        check_names(header, fields.required)
        while True:
            lines.size = 0
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield MalformedRow(f"invalid CSV: {error}")
                continue
            if len(values) == len(header):
                record = dict(zip(header, values, strict=True))
                yield record | {name: number_or_text(record[name]) for name in fields.numbers if name in record}
            elif values:
                yield MalformedRow(f"invalid CSV: {len(values)} values for {len(header)} columns")


def check_names(names: list[str], fields: list[str]) -> None:
    """Raise ValueError if two columns have the name of a required field."""
    for field in fields:
        if names.count(field) > 1:
            raise ValueError(f"{names.count(field)} columns are named '{field}'")


def number_or_text(text: str) -> float | str:
    """`text` as a number if it is one, else unchanged."""
    try:
        return float(text)
    except ValueError:
        return text


def read_parquet(path: Location, fields: list[str], most: int) -> Iterator[Row]:
    """Records of a Parquet file. Only the required columns of a remote file are fetched.

    Rows of a large row group are not read if they have more than `most` bytes on average, by its metadata.
    """
    with (
        nullcontext(path) if isinstance(path, Path) else path.open("rb", cache_type="none") as source,
        pq.ParquetFile(source) as file,
    ):
        names = file.schema_arrow.names
        check_names(names, fields)
        if not set(fields) <= set(names):
            yield from repeat(dict.fromkeys(names), file.metadata.num_rows)
            return
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            size = sum(
                column.total_uncompressed_size
                for column in map(group.column, range(group.num_columns))
                if any(f"{column.path_in_schema}.".startswith(f"{field}.") for field in fields)
            )
            if size > max(ARROW_BYTES, group.num_rows * most):
                yield from repeat(too_large_row(most), group.num_rows)
                continue
            rows = max(1, min(ARROW_ROWS, ARROW_BYTES * group.num_rows // max(1, size)))
            for batch in file.iter_batches(rows, row_groups=[index], columns=fields):
                yield from records(batch, fields, most)


def read_arrow(path: Location, fields: list[str], most: int) -> Iterator[Row]:
    """Records of an Arrow file, in the stream format that `datasets` writes or in the file format."""
    with pa.memory_map(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open("rb"), "r") as file:
        try:
            batches = iter(pa.ipc.open_stream(file))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            for column in batch.columns:
                check_offsets(column)
            for first in range(0, batch.num_rows, ARROW_ROWS):
                yield from records(batch.slice(first, ARROW_ROWS), fields, most)


def read_hub(source: HubSplit, fields: list[str], most: int) -> Iterator[Row]:
    """Records of a Hugging Face dataset."""
    stream = source.builder.as_streaming_dataset(split=source.split)
    for table in stream.with_format("arrow").iter(batch_size=ARROW_ROWS):
        for batch in table.to_batches():
            yield from records(batch, fields, most)


def records(batch: pa.RecordBatch, fields: list[str], most: int) -> Iterator[Row]:
    """Rows of an Arrow batch with the required fields. If one is missing, rows hold only the existing names.

    Rows with a string of more than `most` bytes are not converted.

    Raises:
        ValueError: two columns have the name of a required field.
    """
    names = batch.schema.names
    check_names(names, fields)
    if not set(fields) <= set(names):
        return repeat(dict.fromkeys(names), batch.num_rows)
    columns = [batch.column(name) for name in fields]
    texts = [column for column in columns if is_text(column.type)]
    large = np.any([np.zeros(batch.num_rows, bool), *(text_sizes(column) > most for column in texts)], axis=0)
    if not large.any():  # columns are converted faster than rows
        values = zip(*map(column_values, columns), strict=True)
        return (dict(zip(fields, row, strict=True)) for row in values)
    return (
        too_large_row(most) if is_large else dict(zip(fields, map(python_value, row), strict=True))
        for is_large, row in zip(large, zip(*columns, strict=True), strict=True)
    )


def check_offsets(column: pa.Array) -> None:
    """Check an array of a foreign file, which Arrow reads without checks. Strings may be no UTF-8.

    Raises:
        pa.ArrowInvalid: an offset or an index points outside of its buffers.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if column.type not in BINARY_TYPES:
            raise
        column.cast(BINARY_TYPES[column.type]).validate(full=True)


def column_values(column: pa.Array) -> list[Any]:
    """Python values of a column, as in `python_value`."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(map(python_value, column))


def python_value(scalar: pa.Scalar) -> Any:
    """The Python value of an entry of a column. Bytes that are not UTF-8 become lone surrogates, which are rejected."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        scalar = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")
