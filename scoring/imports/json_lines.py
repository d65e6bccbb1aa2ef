"""Reading JSON Lines in parts of bounded size, also from compressed files."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.json

from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.storage.compression import open_stream
from weighted_mtp.schemas.storage.locations import Location

COMPRESSED = (".gz", ".bz2", ".zst")
"""Not `.xz`: its decoder takes as much memory as the file asks for."""
BATCH_BYTES = 1 << 23
"""Bytes of JSON Lines parsed at once; the column types are those of the first such part."""
MOST_LINE_BYTES = 1 << 26
"""Longest line. Parsing takes up to 14 times its size, and a small compressed file can hold one of any length."""


class Lines(NamedTuple):
    """Some lines of a file that are not blank, and the number of each line in the file, from 0: int64 [lines]."""

    numbers: np.ndarray
    content: list[bytes]


def read_lines(path: Location) -> Iterator[Lines]:
    """The lines of a file in parts of about `BATCH_BYTES` bytes, decompressed according to its name.

    Raises:
        ValueError: a line is longer than `MOST_LINE_BYTES`; the message names it.
    """
    numbers: list[int] = []
    content: list[bytes] = []
    size = number = 0
    with open_stream(path) as stream:
        while line := stream.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(f"row {number + 1:,}: has more than {MOST_LINE_BYTES:,} bytes")
            if not line.isspace():
                numbers.append(number)
                content.append(line)
                size += len(line)
            number += 1
            if size >= BATCH_BYTES:
                yield Lines(np.array(numbers), content)
                numbers, content, size = [], [], 0
    if content:
        yield Lines(np.array(numbers), content)


def parse_lines(
    lines: Lines, schema: pa.Schema | None = None, unexpected: Literal["infer", "error", "ignore"] = "infer"
) -> pa.Table:
    """Parse lines as one block, so that Arrow counts rows from the first.

    Raises:
        ValueError: a line is no object with values of the types; the message names the row.
    """
    content = b"".join(lines.content)
    try:
        table = pa.json.read_json(
            pa.BufferReader(content),
            read_options=pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
        )
    except pa.ArrowInvalid as error:
        place = re.search(r"in row (\d+)", str(error))
        row = f"row {lines.numbers[int(place[1])] + 1:,}" if place else f"from row {lines.numbers[0] + 1:,} on"
        reason = re.sub(r"\.? in row \d+", "", first_line(error))
        raise ValueError(f"{row}: {reason}") from error
    if table.num_rows != len(lines.content):
        raise ValueError(f"from row {lines.numbers[0] + 1:,} on: not one object in each line")
    return table
