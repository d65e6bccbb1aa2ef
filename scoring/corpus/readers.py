"""Reading a corpus: from a source to numbered rows, and from rows to batches of bounded size.

A row is a line of JSON (bytes), a record (dict of JSON or Arrow values), or a `MalformedRow`. Readers do not check
rows, so a bad row affects only itself; `scoring.corpus.documents` checks them.

Files are read with pyarrow and the standard library. The builders of `datasets` (5.2) are used for the hub only: on
local files they accept a truncated `.zst`, find no rows in a file with brackets in its name, ignore the encoding of
compressed files, read the text "NA" in a CSV as missing, and drop a block of JSON because of one bad line.
"""

import csv
import io
import json
import lzma
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.compression import data_suffix, open_stream
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.corpus.documents import Fields, MalformedRow, Row, RowBatch
from weighted_mtp.scoring.corpus.source_files import CorpusFile, HubSplit, Source

SampleBy = Literal["document", "paragraph", "line"]
BATCH_ROWS = 1024
BATCH_BYTES = 1 << 20
ARROW_ROWS = 256
BINARY_TYPES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def read_batches(sources: Iterable[Source], fields: Fields, sample_by: SampleBy = "document") -> Iterator[RowBatch]:
    """Read the sources in order, in batches of at most 1024 rows and about one megabyte of text.

    Args:
        sources: files and datasets, in reading order.
        fields: required fields of a record.
        sample_by: unit of a text file that forms a document.

    Raises:
        UserError: a source cannot be read to its end; the message names it.
    """
    for source in sources:
        rows: list[tuple[int, Row]] = []
        size = 0
        for number, row in read_rows(source, fields, sample_by):
            rows.append((number, row))
            size += row_size(row, fields.text)
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                yield RowBatch(source.name, rows)
                rows, size = [], 0
        if rows:
            yield RowBatch(source.name, rows)


def row_size(row: Row, text_field: str) -> int:
    """Approximate size of the text in a row, in bytes."""
    text = row.get(text_field) if isinstance(row, dict) else row
    return len(text) if isinstance(text, (str, bytes)) else 0


def read_rows(source: Source, fields: Fields, sample_by: SampleBy) -> Iterator[tuple[int, Row]]:
    """Rows of one source, numbered from 0 by line for JSON and text, without blank lines, else by record."""
    where = source.path if isinstance(source, CorpusFile) else source.name
    try:
        if isinstance(source, HubSplit):
            yield from enumerate(read_hub(source, fields.required))
        elif source.format == "json":
            yield from read_json(source.path)
        elif source.format == "text":
            yield from read_text(source.path, fields.text, sample_by)
        elif source.format == "csv":
            yield from enumerate(read_csv(source.path, set(fields.numbers)))
        else:
            read = read_parquet if source.format == "parquet" else read_arrow
            yield from enumerate(read(source.path, fields.required))
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, pa.ArrowException, DatasetsError) as error:
        kind = f" as {source.format}" if isinstance(source, CorpusFile) else ""
        raise UserError(f"{where}: cannot be read{kind} ({first_line(error)}); repair it or leave it out") from error


def read_json(path: Location) -> Iterator[tuple[int, Row]]:
    """Lines of JSON, or the elements of a file that is one JSON array."""
    with open_stream(path) as stream:
        if data_suffix(path) == ".json" and stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from enumerate(json.loads(stream.read().decode("utf-8-sig")))
            return
        for number, line in enumerate(stream):
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line and not line.isspace():
                yield number, line


def read_text(path: Location, text_field: str, sample_by: SampleBy) -> Iterator[tuple[int, Row]]:
    """Documents of a text file: the whole file, its lines, or its paragraphs, separated by blank lines."""
    with open_stream(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n") as stream:
        if sample_by == "document":
            yield 0, {text_field: stream.read()}
        elif sample_by == "line":
            for number, line in enumerate(stream):
                if not line.isspace():
                    yield number, {text_field: line.rstrip("\r\n")}
        else:
            for number, paragraph in enumerate(paragraphs(stream)):
                yield number, {text_field: paragraph}


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of non-blank lines."""
    held: list[str] = []
    for line in lines:
        if not line.isspace():
            held.append(line)
        elif held:
            yield "".join(held).rstrip("\r\n")
            held = []
    if held:
        yield "".join(held).rstrip("\r\n")


def read_csv(path: Location, number_columns: set[str]) -> Iterator[Row]:
    """Records of a CSV or TSV file with a header. No value is read as missing.

    All values are strings, except numbers in `number_columns`.
    """
    csv.field_size_limit(sys.maxsize)
    with (
        open_stream(path) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream,
    ):
        reader = csv.reader(stream, delimiter="\t" if data_suffix(path) == ".tsv" else ",", strict=True)
        header = next(reader, [])
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield MalformedRow(f"invalid CSV: {error}")
                continue
            if len(values) == len(header):
                record = dict(zip(header, values, strict=True))
                yield record | {name: number_or_text(record[name]) for name in number_columns & record.keys()}
            elif values:
                yield MalformedRow(f"invalid CSV: {len(values)} values for {len(header)} columns")


def number_or_text(text: str) -> float | str:
    """`text` as a number if it is one, else unchanged."""
    try:
        return float(text)
    except ValueError:
        return text


def read_parquet(path: Location, fields: list[str]) -> Iterator[Row]:
    """Records of a Parquet file. Only the required columns of a remote file are fetched."""
    with (
        nullcontext(path) if isinstance(path, Path) else path.open("rb", cache_type="none") as source,
        pq.ParquetFile(source) as file,
    ):
        complete = set(fields) <= set(file.schema_arrow.names)
        for batch in file.iter_batches(ARROW_ROWS, columns=fields if complete else None):
            yield from records(batch, fields)


def read_arrow(path: Location, fields: list[str]) -> Iterator[Row]:
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
                yield from records(batch.slice(first, ARROW_ROWS), fields)


def read_hub(source: HubSplit, fields: list[str]) -> Iterator[Row]:
    """Records of a Hugging Face dataset."""
    stream = source.builder.as_streaming_dataset(split=source.split)
    for table in stream.with_format("arrow").iter(batch_size=ARROW_ROWS):
        yield from records(table, fields)


def records(batch: pa.RecordBatch | pa.Table, fields: list[str]) -> Iterator[Row]:
    """Rows of an Arrow batch with the required fields. If one is missing, rows hold only the existing names.

    Raises:
        ValueError: two columns have the name of a field.
    """
    names = batch.schema.names
    if twice := [name for name in fields if names.count(name) > 1]:
        raise ValueError(f"two columns have the name '{twice[0]}'")
    if not set(fields) <= set(names):
        return iter([dict.fromkeys(names)] * batch.num_rows)
    columns = [column_values(batch.column(name)) for name in fields]
    return (dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True))


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


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values of a column. Bytes that are not UTF-8 become lone surrogates, which mark the row as bad."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in values]
