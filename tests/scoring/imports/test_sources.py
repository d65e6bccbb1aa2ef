"""Kinds of columns by their Arrow types."""

import pyarrow as pa
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.imports.score_files import JsonFile
from weighted_mtp.scoring.imports.sources import Kind, choose_columns, kind_of_type


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (pa.uint8(), "number"),
        (pa.float16(), "number"),
        (pa.decimal128(5, 2), "number"),
        (pa.dictionary(pa.int8(), pa.float32()), "number"),
        (pa.string_view(), "label"),
        (pa.dictionary(pa.int8(), pa.large_string()), "label"),
        (pa.date32(), "label"),
        (pa.large_list(pa.float16()), "score"),
        (pa.list_(pa.decimal128(3, 1)), "score"),
        (pa.list_(pa.float64(), 3), "score"),
        (pa.list_(pa.null()), "score"),
        (pa.bool_(), None),
        (pa.list_(pa.bool_()), None),
        (pa.list_(pa.list_(pa.float64())), None),
        (pa.binary(), None),
        (pa.struct({"a": pa.int8()}), None),
    ],
)
def test_kinds(found: pa.DataType, kind: Kind | None) -> None:
    assert kind_of_type(found) == kind


def source(name: str, path: str = "a.jsonl", **types: pa.DataType) -> JsonFile:
    return JsonFile(name, {"document_id": pa.string(), **types}, path)


def test_all_sources_need_the_same_columns_of_the_same_kinds() -> None:
    nothing = source("c", x=pa.null())
    assert choose_columns([source("a", x=pa.int8()), source("b", x=pa.float32()), nothing], ()) == {"x": "number"}
    with pytest.raises(UserError, match="a: column 'x' is a number in a and a label in b; convert it"):
        choose_columns([source("a", x=pa.int8()), source("b", x=pa.string())], ())
    with pytest.raises(UserError, match="b: has no column 'x'; add it"):
        choose_columns([source("a", x=pa.int8()), source("b")], ("x",))
    more, fewer = source("a", x=pa.int8(), y=pa.int8()), source("b", x=pa.int8())
    for pair in ([more, fewer], [fewer, more]):
        with pytest.raises(UserError, match="a: has a column 'y' that b lacks; import one file after the other"):
            choose_columns(pair, ())
    with pytest.raises(UserError, match="c: column 'x' has no value in the first rows; move a row with one"):
        choose_columns([nothing], ())


def test_names_and_number_of_columns_are_bounded() -> None:
    assert choose_columns([source("a", **{"x" * 200: pa.int8()})], ()) == {"x" * 200: "number"}
    with pytest.raises(UserError, match=r"'xxx.*\.\.\.' cannot be a column name \(at most 200 letters"):
        choose_columns([source("a", **{"x" * 201: pa.int8()})], ())
    many = source("a", **{f"x{n}": pa.int8() for n in range(1001)})
    with pytest.raises(UserError, match="a: has 1,001 columns to add; choose at most 1,000 with --columns"):
        choose_columns([many], ())
    assert choose_columns([many], ("x7", "x7")) == {"x7": "number"}


def test_the_unnamed_index_of_pandas_is_no_column() -> None:
    table = source("a", x=pa.int8(), __index_level_0__=pa.int64())
    assert choose_columns([table, source("b", x=pa.int8())], ()) == {"x": "number"}
    assert choose_columns([table], ("__index_level_0__",)) == {"__index_level_0__": "number"}
