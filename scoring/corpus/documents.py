"""From rows to documents: every row is either a text with a name or rejected for a reason."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.shard_set.manifest import SequenceKind

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Malformed:
    """A row that its format's reader could not make sense of."""

    reason: str


Row = Any
"""A line of JSON as bytes, a record, or `Malformed`."""


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a record: its text, its name if it has one, and what its sequences will carry."""

    text: str
    id: str | None = None
    numbers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: PrepareConfig) -> "Fields":
        """The fields that the settings name."""
        return cls(config.text_field, config.id_field, config.number_fields, config.label_fields)

    @property
    def wanted(self) -> list[str]:
        """All that a record must have, each once."""
        named = [self.id] if self.id is not None else []
        return list(dict.fromkeys([self.text, *named, *self.columns]))

    @property
    def columns(self) -> dict[str, SequenceKind]:
        """The sequence columns that the fields become."""
        numbers: dict[str, SequenceKind] = dict.fromkeys(self.numbers, "number")
        return numbers | dict.fromkeys(self.labels, "label")


class Batch(NamedTuple):
    """Rows of one source, each with its number there."""

    source: str
    rows: list[tuple[int, Row]]


class Document(NamedTuple):
    """A text that is neither blank nor invalid Unicode, its name, and its values of the sequence columns."""

    id: str
    text: str
    row: int
    values: tuple[float | str, ...] = ()


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


def parse_batch(batch: Batch, fields: Fields) -> tuple[list[Document], list[Reject]]:
    """Judge each row by itself.

    Returns:
        The documents and the rejected rows, both in the order of the rows.
    """
    documents: list[Document] = []
    rejects: list[Reject] = []
    wanted = fields.wanted
    for number, row in batch.rows:
        try:
            record = parse_row(row)
            for field in wanted:
                if field not in record:
                    raise BadRowError(f"no field '{field}': the fields are {', '.join(record) or 'none'}")
            name = label(record[fields.id], fields.id) if fields.id else f"{batch.source}#{number}"
            text = document_text(record[fields.text], fields.text)
            values = (finite_number(record[field], field) for field in fields.numbers)
            labels = (label(record[field], field) for field in fields.labels)
            documents.append(Document(name, text, number, (*values, *labels)))
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


def label(value: Any, field: str) -> str:
    """The name of a document, or of a group of them, from the field `field`."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRowError(f"field '{field}' is neither a string nor an integer: {type(value).__name__}")
    return check_unicode(str(value), field)


def finite_number(value: Any, field: str) -> float:
    """A number that float32 can hold, from the field `field`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRowError(f"field '{field}' is not a number: {type(value).__name__}")
    if not abs(value) <= FLOAT32_MAX:
        raise BadRowError(f"field '{field}' is not finite as float32: {value!s:.20}")
    return float(value)


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
