"""Reading JSON Lines in parts of bounded size, also from compressed files."""

import codecs
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.json

from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.storage.compression import COMPRESSIONS, open_stream
from weighted_mtp.schemas.storage.locations import Location

COMPRESSED = tuple(suffix for suffix in COMPRESSIONS if suffix != ".xz")
"""Not `.xz`: its decoder takes as much memory as the file asks for."""
BATCH_BYTES = 1 << 23
"""Bytes of JSON Lines parsed at once; the column types are those of the first such part."""
MOST_LINE_BYTES = 1 << 26
"""Longest line. Parsing takes up to 14 times its size, and a small compressed file can hold one of any length."""
MOST_BLANK_BYTES = 1 << 23
"""Bytes of blank lines by which they may exceed the other lines before them."""
MOST_DEPTH = 256
"""Deepest nesting of lists and objects. Arrow's parser recurses and would overflow the stack."""
NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}\n'))
SPACE = b" \t\r\n"


class Lines(NamedTuple):
    """Some lines of a file that are not blank, and the number of each line in the file, from 0: int64 [lines]."""

    numbers: np.ndarray
    content: list[bytes]


def read_lines(path: Location) -> Iterator[Lines]:
    """The lines of a file in parts of about `BATCH_BYTES` bytes, decompressed according to its name.

    Raises:
        ValueError: a line is longer than `MOST_LINE_BYTES`, or there are too many blank lines; the message names it.
    """
    numbers: list[int] = []
    content: list[bytes] = []
    size = number = blank = 0
    with open_stream(path) as stream:
        while line := stream.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                raise ValueError(f"row {number + 1:,}: has more than {MOST_LINE_BYTES:,} bytes")
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line or line.isspace():
                blank += len(line)
                if blank > MOST_BLANK_BYTES:
                    raise ValueError(f"row {number + 1:,}: more than {MOST_BLANK_BYTES:,} bytes of blank lines")
            else:
                numbers.append(number)
                content.append(line)
                size += len(line)
                blank = max(0, blank - len(line))
            number += 1
            if size >= BATCH_BYTES:
                yield Lines(np.array(numbers), content)
                numbers, content, size = [], [], 0
    if content:
        yield Lines(np.array(numbers), content)


def parse_lines(
    lines: Lines, schema: pa.Schema | None = None, unexpected: Literal["infer", "error", "ignore"] = "infer"
) -> pa.Table:
    """Parse lines as one block.

    Raises:
        ValueError: a line is no object with values of the types; the message names the row.
    """

    def parse(count: int) -> pa.Table:
        return parse_objects(lines.content[:count], schema, unexpected)

    def fails(count: int) -> bool:
        try:
            parse(count)
        except ValueError:
            return True
        return False

    try:
        return parse(len(lines.content))
    except ValueError:
        # Arrow counts objects, not lines, and often names no row.
        wrong = bisect_left(range(1, len(lines.content)), True, key=fails)
        try:
            return parse(wrong + 1)
        except ValueError as error:
            reason = re.sub(r"\.? in row \d+", "", first_line(error))
            raise ValueError(f"row {lines.numbers[wrong] + 1:,}: {reason}") from error


def parse_objects(lines: list[bytes], schema: pa.Schema | None, unexpected: str) -> pa.Table:
    """Parse lines as one block.

    Raises:
        ValueError: a line is no object with values of the types.
    """
    content = b"".join(lines)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("is not in UTF-8") from error
    levels, marks = nesting(content)
    if levels.max(initial=0) > MOST_DEPTH:
        raise ValueError(f"lists and objects are nested more than {MOST_DEPTH} deep")
    check_objects(lines, levels, marks)
    table = pa.json.read_json(
        pa.BufferReader(content),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
        parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
    )
    if table.num_rows != len(lines):
        raise ValueError("not one object in each line")
    return table


def check_objects(lines: list[bytes], levels: np.ndarray, marks: np.ndarray) -> None:
    """Check that nothing is outside of objects, such as null: Arrow's parser crashes there.

    Args:
        lines: the lines of the content.
        levels: as `nesting` returns them.
        marks: as `nesting` returns them.

    Raises:
        ValueError: a line has something else than one object, or a part of it.
    """
    after = [*levels[marks == ord("\n")].tolist(), 0]
    for line, begins, ends in zip(lines, [True, *(level == 0 for level in after)], after, strict=False):
        if (begins and line.lstrip(SPACE)[:1] != b"{") or (ends == 0 and line.rstrip(SPACE)[-1:] != b"}"):
            raise ValueError("not one object in each line")
    ended = np.cumsum((levels == 0) & (marks != ord("\n")))[marks == ord("\n")]
    if (ended > np.arange(1, len(ended) + 1)).any():
        raise ValueError("not one object in each line")


def nesting(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Brackets and line breaks of JSON, outside of strings: the number of open brackets after each, and what it is.

    Right up to the first error in the JSON. Both arrays are as long as there are brackets and line breaks.
    """
    if b"\\" in content:
        content = re.sub(rb"\\.", b"", content, flags=re.DOTALL)
    marks = np.frombuffer(re.sub(rb'"[^"]*"', b"", content.translate(None, NOT_STRUCTURE)), np.uint8)
    opening, closing = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    return np.cumsum(opening.view(np.int8) - closing.view(np.int8), dtype=np.int32), marks
