"""Reading streams in pieces, so that no file makes a process hold more than a bound."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import IO, Any, AnyStr

PIECE = 1 << 20
"""Bytes or characters read at once."""
SPACE = re.compile(r"[ \t\n\r]*")
DELIMITERS = tuple(" \t\n\r,]")
"""What follows an element of a JSON array."""


def bounded_lines(stream: IO[AnyStr], most: int) -> Iterator[tuple[int, AnyStr | None]]:
    """The number, from 0, and the content of each line; None for a line of more than `most` bytes or characters."""
    for number in count():
        line = stream.readline(most + 1)
        if not line:
            return
        if len(line) <= most or is_end(line):
            yield number, line
        else:
            while line and not is_end(line):
                line = stream.readline(PIECE)
            yield number, None


def is_end(piece: AnyStr) -> bool:
    """Whether a piece of a line is its last."""
    return piece[-1:] in (b"\n", "\n")


def bounded_whole(stream: IO[str], most: int) -> str | None:
    """All of a stream, which is read to its end; None if it has more than `most` characters."""
    text = stream.read(most + 1)
    if len(text) <= most:
        return text
    while stream.read(PIECE):
        pass
    return None


def paragraphs(lines: Iterable[str | None], most: int) -> Iterator[str | None]:
    """Runs of lines that are not blank; None for a run of more than `most` characters. None among the lines is long."""
    held: list[str] = []
    size = 0
    for line in lines:
        if line is None or not line.isspace():
            size += most + 1 if line is None else len(line)
            if line is None or size > most:
                held = []
            else:
                held.append(line)
        elif size:
            yield "".join(held).rstrip("\r\n") if size <= most else None
            held, size = [], 0
    if size:
        yield "".join(held).rstrip("\r\n") if size <= most else None


class JsonArray:
    """The elements of a JSON array in a stream, parsed one by one.

    Args:
        stream: text that starts with the array.
        most: longest element, in characters.
        make_object: makes an object of its pairs.
    """

    def __init__(self, stream: IO[str], most: int, make_object: Callable[[list[tuple[str, Any]]], Any] = dict) -> None:
        self.stream = stream
        self.most = most
        self.text = ""
        self.at = 0
        self.decode = json.JSONDecoder(object_pairs_hook=make_object).raw_decode

    def __iter__(self) -> Iterator[Any]:
        """Parse the elements.

        Raises:
            ValueError: it is no valid JSON array, or an element is too long; the message counts them from 0.
        """
        self._take("[", "the file")
        if self._next() == "]":
            self._take("]", "the file")
        else:
            for number in count():
                yield self._element(number)
                if self._take(",]", f"element {number}") == "]":
                    break
        if self._next():
            raise ValueError("more text after the array")

    def _element(self, number: int) -> Any:
        self._next()
        while True:
            problem: ValueError | None = None
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError as error:
                problem = error
            if not problem and self.text[end : end + 1] in DELIMITERS:  # else a number may go on
                break
            if len(self.text) - self.at > self.most:
                raise ValueError(f"element {number} is no valid JSON, or longer than {self.most:,} characters")
            if not self._read():
                if problem:
                    raise ValueError(f"element {number} is no valid JSON") from problem
                break
        self.at = end
        return value

    def _take(self, wanted: str, before: str) -> str:
        found = self._next()
        if not found or found not in wanted:
            raise ValueError(f"no '{wanted[0]}' after {before}" if found else "the array has no end")
        self.at += 1
        return found

    def _next(self) -> str:
        """The next character that is not space, or "" at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            assert space is not None, "it matches the empty string"
            self.at = space.end()
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _read(self) -> bool:
        """Read on, at least as much as is held; False at the end of the stream."""
        held = self.text[self.at :]
        more = self.stream.read(max(PIECE, len(held)))
        self.text, self.at = held + more, 0
        return bool(more)
