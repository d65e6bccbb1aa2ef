"""Streams read in pieces give what reading them whole gives, up to a bound."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighted_mtp.scoring.corpus import pieces
from weighted_mtp.scoring.corpus.pieces import JsonArray, bounded_lines, bounded_whole, paragraphs


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Any:
    """Pieces of three characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 3)
        yield


@given(text=st.text("ab \n", max_size=60), most=st.integers(1, 12))
def test_lines(text: str, most: int) -> None:
    lines = text.splitlines(keepends=True)
    expected = [line if len(line.rstrip("\n")) <= most else None for line in lines]
    for content, wanted in ((text, expected), (text.encode(), [line and line.encode() for line in expected])):
        stream: Any = io.StringIO(content) if isinstance(content, str) else io.BytesIO(content)
        assert list(bounded_lines(stream, most)) == list(enumerate(wanted))


@given(text=st.text("ab ", max_size=20), most=st.integers(1, 12))
def test_whole_texts(text: str, most: int) -> None:
    stream = io.StringIO(text)
    assert bounded_whole(stream, most) == (text if len(text) <= most else None)
    assert stream.read() == ""


def test_paragraphs() -> None:
    lines = ["\n", "a\n", "b\n", " \n", None, "c\n", "\n", "defg\n", "h\n", "\n", "ijklm\n"]
    assert list(paragraphs(lines, 6)) == ["a\nb", None, None, "ijklm"]
    assert list(paragraphs([*lines, None], 7)) == ["a\nb", None, "defg\nh", None]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(array=st.lists(values, max_size=6), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_elements_of_an_array(array: list[Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(array, indent=indent, ensure_ascii=ascii_only)
    assert list(JsonArray(io.StringIO(f" {text}\n "), 1000)) == array


@given(text=st.text('[]{},:" 12"', max_size=12))
def test_what_is_no_array_is_an_error(text: str) -> None:
    try:
        expected = json.loads("[" + text)
    except ValueError:
        with pytest.raises(ValueError, match=r"element|after|end"):
            list(JsonArray(io.StringIO("[" + text), 1000))
    else:
        assert list(JsonArray(io.StringIO("[" + text), 1000)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "the array has no end"),
        ("[1 2]", "no ',' after element 0"),
        ("[1, x]", "element 1 is no valid JSON$"),
        ("[1, ]", "element 1 is no valid JSON$"),
        ("[1] 2", "more text after the array"),
        ('[1, "' + "a" * 100 + '"]', "element 1 is no valid JSON, or longer than 20 characters"),
    ],
)
def test_the_place_of_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(JsonArray(io.StringIO(text), 20))


def test_elements_before_an_error_are_given() -> None:
    elements = iter(JsonArray(io.StringIO("[1, {}, x"), 20))
    assert [next(elements), next(elements)] == [1, {}]
