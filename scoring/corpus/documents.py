"""From rows to documents: a row becomes a named text, or is rejected with a reason."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from weighted_mtp.schemas.configs.prepare import MAX_DOCUMENT_BYTES
from weighted_mtp.schemas.shard_set.manifest import SequenceKind
from weighted_mtp.schemas.shard_set.shards import MOST_TEXT_BYTES
from weighted_mtp.schemas.text import printable

MOST_NAMES = 20
MOST_NAMES_SHOWN = 200
"""Most field names, and characters of them, in a reason."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class MalformedRow:
    """A row that its reader could not parse."""

    reason: str


Row = Any
"""A line of JSON as bytes, a record (dict), or a `MalformedRow`."""


@dataclass(frozen=True)
class Fields:
    """Field names of a record: its text, its id if any, and the fields that become sequence columns."""

    text: str
    id: str | None = None
    numbers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def required(self) -> list[str]:
        """Fields that every record must have, without duplicates."""
        named = [self.id] if self.id is not None else []
        return list(dict.fromkeys([self.text, *named, *self.columns]))

    @property
    def columns(self) -> dict[str, SequenceKind]:
        """Name and kind of each sequence column."""
        numbers: dict[str, SequenceKind] = dict.fromkeys(self.numbers, "number")
        return numbers | dict.fromkeys(self.labels, "label")


class RowBatch(NamedTuple):
    """Rows of one source, each with its row number."""

    source: str
    rows: list[tuple[int, Row]]


class Document(NamedTuple):
    """A text that is valid Unicode, not blank and not too large, its id, and its values of the sequence columns."""

    id: str
    text: str
    row: int
    values: tuple[float | str, ...] = ()


class RejectedDocument(NamedTuple):
    """A row without a document. The part of `reason` after a colon varies from row to row."""

    source: str
    row: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


class BadRowError(Exception):
    """The reason to reject a row."""


def too_large(max_document_bytes: int) -> str:
    """The reason to reject a document of more than `max_document_bytes` bytes."""
    return f"larger than {max_document_bytes:,} bytes (--max_document_bytes)"


def parse_batch(
    batch: RowBatch, fields: Fields, max_document_bytes: int = MAX_DOCUMENT_BYTES
) -> tuple[list[Document], list[RejectedDocument]]:
    """Parse and check each row on its own.

    Args:
        batch: rows of one source.
        fields: fields of a record.
        max_document_bytes: largest document, in bytes of UTF-8.

    Returns:
        Documents and rejected rows, both in row order.
    """
    documents: list[Document] = []
    rejects: list[RejectedDocument] = []
    required = fields.required
    for number, row in batch.rows:
        try:
            record = parse_row(row, required)
            for field in required:
                if field not in record:
                    names = printable(", ".join(islice(record, MOST_NAMES)))[:MOST_NAMES_SHOWN]
                    raise BadRowError(f"no field '{field}': the fields are {names or 'none'}")
            name = label(record[fields.id], fields.id) if fields.id else f"{batch.source}#{number}"
            text = document_text(record[fields.text], fields.text, max_document_bytes)
            values = (finite_number(record[field], field) for field in fields.numbers)
            labels = (label(record[field], field) for field in fields.labels)
            documents.append(Document(name, text, number, (*values, *labels)))
        except BadRowError as error:
            rejects.append(RejectedDocument(batch.source, number, str(error)))
    return documents, rejects


def json_object(required: Sequence[str], pairs: list[tuple[str, Any]]) -> dict[str, Any] | MalformedRow:
    """A JSON object, for the hook of its parser. Without the hook, the last of the fields with a name would count."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        for field in required:
            if names.count(field) > 1:
                return MalformedRow(f"field '{field}' occurs {names.count(field)} times")
    return record


def parse_row(row: Row, required: Sequence[str]) -> dict[str, Any]:
    """The record in a row, with the fields `required` at most once.

    Raises:
        BadRowError: the row is not valid JSON, or not such an object.
    """
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode(), object_pairs_hook=partial(json_object, required))
        except UnicodeDecodeError as error:
            raise BadRowError(f"invalid UTF-8: {error.reason} at byte {error.start}") from error
        except RecursionError as error:
            raise BadRowError("invalid JSON: nested too deeply") from error
        except ValueError as error:
            raise BadRowError(f"invalid JSON: {error}") from error
    if isinstance(row, MalformedRow):
        raise BadRowError(row.reason)
    if not isinstance(row, dict):
        raise BadRowError(f"not an object: {type(row).__name__}")
    return row


def label(value: Any, field: str) -> str:
    """The value of field `field` as a label or a document id; raise BadRowError if it cannot be one."""
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRowError(f"field '{field}' is neither a string nor an integer: {type(value).__name__}")
    text = str(value)
    if utf8_size(text, field) > MOST_TEXT_BYTES:
        raise BadRowError(f"field '{field}' is larger than {MOST_TEXT_BYTES:,} bytes")
    return text


def finite_number(value: Any, field: str) -> float:
    """The value of field `field` as a number; raise BadRowError if it is not finite as float32."""
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRowError(f"field '{field}' is not a number: {type(value).__name__}")
    if not abs(value) <= FLOAT32_MAX:
        raise BadRowError(f"field '{field}' is not finite as float32: {value!s:.20}")
    return float(value)


def document_text(value: Any, field: str, max_document_bytes: int) -> str:
    """The value of field `field` as the text of a document.

    Raises:
        BadRowError: it is no valid string, blank, or larger than `max_document_bytes` bytes.
    """
    if not isinstance(value, str):
        raise BadRowError(f"field '{field}' is not a string: {type(value).__name__}")
    if not value or value.isspace():
        raise BadRowError("empty text")
    if utf8_size(value, field) > max_document_bytes:
        raise BadRowError(too_large(max_document_bytes))
    return value


def utf8_size(text: str, field: str) -> int:
    """Size of `text` in bytes; raise BadRowError for lone surrogates, which tokenizers reject."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRowError(f"field '{field}' is not valid Unicode: at character {error.start}") from error
