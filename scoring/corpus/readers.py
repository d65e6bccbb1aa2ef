"""Reading a corpus: from a source to numbered rows, and from rows to batches of bounded size.

A row is a line of JSON (bytes), a record (anything that JSON or Arrow can hold), or `Malformed`. Nothing is judged
here, so that one bad row costs nothing but itself; see `scoring.corpus.documents`.

Files are read with pyarrow and the standard library. The builders of `datasets` (5.2) are kept for the hub: on local
files they read a truncated `.zst` as if it ended there, find no rows in a file with brackets in its name, ignore the
encoding of compressed files, read the text "NA" in a CSV as missing, and drop a block of JSON for one bad line.
"""

import csv
import io
import json
import lzma
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.corpus.documents import Batch, Fields, Malformed, Row
from weighted_mtp.scoring.corpus.sources import CorpusFile, HubSplit, Source, data_suffix

BATCH_ROWS = 1024
BATCH_BYTES = 1 << 20
ARROW_ROWS = 256


def read_batches(sources: Iterable[Source], config: PrepareConfig) -> Iterator[Batch]:
    """Read the sources one after the other, in batches of at most 1024 rows that close at about one megabyte.

    Raises:
        UserError: a source cannot be read to its end; the message names it.
    """
    for source in sources:
        rows: list[tuple[int, Row]] = []
        size = 0
        for number, row in read_rows(source, config):
            rows.append((number, row))
            size += row_size(row, config.text_field)
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                yield Batch(source.name, rows)
                rows, size = [], 0
        if rows:
            yield Batch(source.name, rows)


def row_size(row: Row, text_field: str) -> int:
    """About how many bytes of text a row holds."""
    text = row.get(text_field) if isinstance(row, dict) else row
    return len(text) if isinstance(text, (str, bytes)) else 0


def read_rows(source: Source, config: PrepareConfig) -> Iterator[tuple[int, Row]]:
    """Rows of one source, numbered from 0: JSON and text by line (blank lines are no rows), all else by record."""
    where = source.path if isinstance(source, CorpusFile) else source.name
    try:
        if isinstance(source, HubSplit):
            yield from enumerate(read_hub(source, config))
        elif source.format == "json":
            yield from read_json(source.path)
        elif source.format == "text":
            yield from read_text(source.path, config)
        elif source.format == "csv":
            yield from enumerate(read_csv(source.path, set(config.number_fields)))
        else:
            read = read_parquet if source.format == "parquet" else read_arrow
            yield from enumerate(read(source.path, Fields.of(config).wanted))
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, pa.ArrowException, DatasetsError) as error:
        kind = f" as {source.format}" if isinstance(source, CorpusFile) else ""
        raise UserError(f"{where}: cannot be read{kind} ({first_line(error)}); repair it or leave it out") from error


def openable(path: Location) -> Any:
    """What pyarrow and lzma open: the name of a local file, or an open file in a store, which they close."""
    return str(path) if isinstance(path, Path) else path.open("rb")


def open_stream(path: Location) -> io.BufferedReader | lzma.LZMAFile:
    """Open a file for buffered binary reading, decompressed according to its name."""
    if path.suffix.lower() == ".xz":
        return lzma.open(openable(path))
    compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix.lower())
    return io.BufferedReader(pa.input_stream(openable(path), compression=compression), 1 << 20)


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


def read_text(path: Location, config: PrepareConfig) -> Iterator[tuple[int, Row]]:
    """Documents of a text file: the whole file, its lines, or its paragraphs, which blank lines separate."""
    with open_stream(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n") as stream:
        if config.sample_by == "document":
            yield 0, {config.text_field: stream.read()}
        elif config.sample_by == "line":
            for number, line in enumerate(stream):
                if not line.isspace():
                    yield number, {config.text_field: line.rstrip("\r\n")}
        else:
            for number, paragraph in enumerate(paragraphs(stream)):
                yield number, {config.text_field: paragraph}


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines that are not blank."""
    held: list[str] = []
    for line in lines:
        if not line.isspace():
            held.append(line)
        elif held:
            yield "".join(held).rstrip("\r\n")
            held = []
    if held:
        yield "".join(held).rstrip("\r\n")


def read_csv(path: Location, numbers: set[str]) -> Iterator[Row]:
    """Records of a CSV or TSV file with a header; no value is taken to mean "missing".

    All values are strings, but those of the columns `numbers` that spell a number.
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
                yield Malformed(f"invalid CSV: {error}")
                continue
            if len(values) == len(header):
                record = dict(zip(header, values, strict=True))
                yield record | {name: number_or_text(record[name]) for name in numbers & record.keys()}
            elif values:
                yield Malformed(f"invalid CSV: {len(values)} values for {len(header)} columns")


def number_or_text(text: str) -> float | str:
    """The number that `text` spells, else `text`."""
    try:
        return float(text)
    except ValueError:
        return text


def read_parquet(path: Location, fields: list[str]) -> Iterator[Row]:
    """Records of a Parquet file; of a remote one only the columns wanted are fetched."""
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
            for first in range(0, batch.num_rows, ARROW_ROWS):
                yield from records(batch.slice(first, ARROW_ROWS), fields)


def read_hub(source: HubSplit, config: PrepareConfig) -> Iterator[Row]:
    """Records of a Hugging Face dataset."""
    stream = source.builder.as_streaming_dataset(split=source.split)
    for table in stream.with_format("arrow").iter(batch_size=ARROW_ROWS):
        yield from records(table, Fields.of(config).wanted)


def records(batch: pa.RecordBatch | pa.Table, fields: list[str]) -> Iterator[Row]:
    """Rows of an Arrow batch with the fields wanted; where one is missing, the names of those that are there."""
    names = batch.schema.names
    if not set(fields) <= set(names):
        return iter([dict.fromkeys(names)] * batch.num_rows)
    columns = [column_values(batch.column(name)) for name in fields]
    return (dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True))


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values of a column. Bytes that are not UTF-8 become lone surrogates, which mark the row as bad."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in values]
