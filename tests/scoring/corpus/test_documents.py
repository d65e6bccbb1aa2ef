import json

import pytest

from weighted_mtp.scoring.corpus.documents import Document, Fields, RejectedDocument, RowBatch, parse_batch

GOOD = b'{"text": "good"}'


def parse(lines: list[bytes], fields: Fields) -> tuple[list[Document], list[RejectedDocument]]:
    return parse_batch(RowBatch("source", list(enumerate(lines))), fields)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "cut', "invalid JSON"),
        (b'{"text": 1' + b"1" * 5000 + b"}", "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        (b"{}", "no field 'text'"),
        (b'{"text": "a", "text": "a"}', "field 'text' occurs 2 times"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": null}', "field 'text' is not a string"),
        (b'{"text": 5}', "field 'text' is not a string"),
        (b'{"text": ["x"]}', "field 'text' is not a string"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t"}', "empty text"),
        (b'{"text": "\\ud800"}', "field 'text' is not valid Unicode"),
    ],
)
def test_a_bad_line_is_rejected_alone(line: bytes, kind: str) -> None:
    documents, rejects = parse([GOOD, line, GOOD], Fields("text"))
    assert [(document.row, document.text) for document in documents] == [(0, "good"), (2, "good")]
    assert [(reject.row, reject.kind) for reject in rejects] == [(1, kind)]


def test_other_fields_may_be_repeated() -> None:
    line = b'{"text": "a", "b": {"text": 1, "text": 2}, "b": 3}'
    assert [document.text for document in parse([line], Fields("text"))[0]] == ["a"]


@pytest.mark.parametrize(
    ("value", "ok"), [('"a"', True), ("7", True), ("true", False), ("1.5", False), ("null", False)]
)
def test_ids_are_strings_or_integers(value: str, ok: bool) -> None:
    documents, rejects = parse([b'{"text": "x", "id": %s}' % value.encode()], Fields("text", "id"))
    assert (len(documents), len(rejects)) == (ok, not ok)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("-1.5", -1.5),
        ("7", 7.0),
        ("1e38", 1e38),
        ("true", "field 'reward' is not a number"),
        ("null", "field 'reward' is not a number"),
        ('"1"', "field 'reward' is not a number"),
        ("NaN", "field 'reward' is not finite as float32"),
        ("-Infinity", "field 'reward' is not finite as float32"),
        ("1e39", "field 'reward' is not finite as float32"),
        ("1" + "0" * 400, "field 'reward' is not finite as float32"),
    ],
)
def test_numbers_are_finite_as_float32(value: str, kept: float | str) -> None:
    line = b'{"text": "x", "reward": %s}' % value.encode()
    documents, rejects = parse([line], Fields("text", numbers=("reward",)))
    assert [document.values for document in documents] == ([(kept,)] if isinstance(kept, float) else [])
    assert [reject.kind for reject in rejects] == ([kept] if isinstance(kept, str) else [])


def test_ids_and_labels_are_bounded() -> None:
    lines = [json.dumps({"text": "x", "id": "\u00e9" * size}).encode() for size in (1 << 15, (1 << 15) + 1)]
    documents, rejects = parse(lines, Fields("text", "id"))
    assert [document.row for document in documents] == [0]
    assert [reject.reason for reject in rejects] == ["field 'id' is larger than 65,536 bytes"]


def test_labels_are_strings_or_integers_and_a_missing_field_is_a_reject() -> None:
    rows = [{"group": "a"}, {"group": 7}, {"group": 7.5}, {}, {"group": "\ud800"}]
    lines = [json.dumps({"text": "x"} | row).encode() for row in rows]
    documents, rejects = parse(lines, Fields("text", labels=("group",)))
    assert [document.values for document in documents] == [("a",), ("7",)]
    assert [(reject.row, reject.kind) for reject in rejects] == [
        (2, "field 'group' is neither a string nor an integer"),
        (3, "no field 'group'"),
        (4, "field 'group' is not valid Unicode"),
    ]
