"""From rows to documents: every row is either a text with a name or rejected for a reason."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Malformed:
    """A row that its format's reader could not make sense of."""

    reason: str


Row = Any
"""A line of JSON as bytes, a record, or `Malformed`."""


class Batch(NamedTuple):
    """Rows of one source, each with its number there."""

    source: str
    rows: list[tuple[int, Row]]


class Document(NamedTuple):
    """A text that is neither blank nor invalid Unicode, and its name."""

    id: str
    text: str
    row: int


class Reject(NamedTuple):
    """A row that gives no document. What follows a colon in `reason` differs from row to row."""

    source: str
    row: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


class BadRowError(Exception):
    """Why a row is rejected."""


def parse_batch(batch: Batch, text_field: str, id_field: str | None) -> tuple[list[Document], list[Reject]]:
    """Judge each row by itself.

    Returns:
        The documents and the rejected rows, both in the order of the rows.
    """
    documents: list[Document] = []
    rejects: list[Reject] = []
    for number, row in batch.rows:
        try:
            record = parse_row(row)
            for field in (text_field, id_field):
                if field is not None and field not in record:
                    raise BadRowError(f"no field '{field}': the fields are {', '.join(record) or 'none'}")
            name = document_id(record[id_field], id_field) if id_field else f"{batch.source}#{number}"
            documents.append(Document(name, document_text(record[text_field], text_field), number))
        except BadRowError as error:
            rejects.append(Reject(batch.source, number, str(error)))
    return documents, rejects


def parse_row(row: Row) -> dict[str, Any]:
    """The record that a row holds."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode())
        except UnicodeDecodeError as error:
            raise BadRowError(f"invalid UTF-8: {error.reason} at byte {error.start}") from error
        except RecursionError as error:
            raise BadRowError("invalid JSON: nested too deeply") from error
        except ValueError as error:
            raise BadRowError(f"invalid JSON: {error}") from error
    if isinstance(row, Malformed):
        raise BadRowError(row.reason)
    if not isinstance(row, dict):
        raise BadRowError(f"not an object: {type(row).__name__}")
    return row


def document_id(value: Any, field: str) -> str:
    """The name of a document from the field `field`."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRowError(f"field '{field}' is neither a string nor an integer: {type(value).__name__}")
    return check_unicode(str(value), field)


def document_text(value: Any, field: str) -> str:
    """The text of a document from the field `field`."""
    if not isinstance(value, str):
        raise BadRowError(f"field '{field}' is not a string: {type(value).__name__}")
    if not value or value.isspace():
        raise BadRowError("empty text")
    return check_unicode(value, field)


def check_unicode(text: str, field: str) -> str:
    """Return `text` unless it holds lone surrogates, which no tokenizer takes and UTF-8 cannot store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"field '{field}' is not valid Unicode: at character {error.start}") from error
    return text
