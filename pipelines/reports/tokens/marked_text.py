"""Text with marks for token weights, and shades if the output has colours."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from weighted_mtp.pipelines.reports.tokens.token_text import decode
from weighted_mtp.schemas.text import printable

LEGEND = (
    "‹no weight, or less than half the mean of the kept tokens›  unmarked: between  «at least twice the mean»  "
    "-‹negative›-"
)


@dataclass(frozen=True)
class Excerpt:
    """Consecutive tokens of a document.

    Attributes:
        document_id: ID of the document.
        position: position of the first token in the document.
        ids: (T,) token ids.
        weights: (T,) float32, NaN for a token that is not a target.
        begins: whether the excerpt starts its sequence.
        ends: whether the excerpt ends its sequence.
    """

    document_id: str
    position: int
    ids: np.ndarray
    weights: np.ndarray
    begins: bool
    ends: bool


class Piece(NamedTuple):
    """The text of a token, or of several tokens that form one character, and their mean weight."""

    text: str
    weight: float


class MarkStyle(NamedTuple):
    """Marks and style for a weight."""

    opening: str
    closing: str
    style: str


PLAIN = MarkStyle("", "", "")
DROPPED = MarkStyle("‹", "›", "dim")
POSITIVE = (
    (0.5, MarkStyle("‹", "›", "black on #e5f5e0")),
    (1.0, MarkStyle("", "", "black on #c7e9c0")),
    (2.0, MarkStyle("", "", "black on #a1d99b")),
    (4.0, MarkStyle("«", "»", "black on #74c476")),
    (np.inf, MarkStyle("«", "»", "black on #31a354")),
)
"""Styles of positive weights, by upper bound as a multiple of the typical weight."""
NEGATIVE = ((1.0, MarkStyle("-‹", "›-", "black on #fcbba1")), (np.inf, MarkStyle("-‹", "›-", "black on #fb6a4a")))


def mark_style(weight: float, typical: float) -> MarkStyle:
    """The style for a weight; `typical` is the mean absolute weight of the kept tokens."""
    if np.isnan(weight):
        return PLAIN
    if weight == 0:
        return DROPPED
    styles = POSITIVE if weight > 0 else NEGATIVE
    # The margin allows for rounding: equal weights must get the style of their mean.
    return next(style for below, style in styles if abs(weight) < below * typical * (1 - 1e-6))


def marked(excerpt: Excerpt, tokenizer: Any, typical: float) -> Text:
    """The marked text of an excerpt. A run of tokens with the same style is marked as one."""
    text = Text("" if excerpt.begins else "… ", overflow="fold")
    styled = [(piece, mark_style(piece.weight, typical)) for piece in pieces(tokenizer, excerpt)]
    for (opening, closing), run in groupby(styled, key=lambda pair: pair[1][:2]):
        first, *rest = run
        words = first[0].text.lstrip(" ")
        if words:  # keep spaces before a word outside the marks
            text.append(first[0].text[: -len(words)], first[1].style)
        text.append(opening, "bold")
        text.append(visible(words or first[0].text), first[1].style)
        for piece, style in rest:
            text.append(visible(piece.text), style.style)
        text.append(closing, "bold")
    return text.append("" if excerpt.ends else " …")


def pieces(tokenizer: Any, excerpt: Excerpt) -> Iterator[Piece]:
    """The text of each token in order; tokens that form one character are one piece."""
    ids = excerpt.ids.tolist()
    shown, first = "", 0
    for end in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue
        own = text[len(shown) :] if text.startswith(shown) else decode(tokenizer, ids[first:end])
        yield Piece(own, float(excerpt.weights[first:end].mean()))
        shown, first = text, end


def visible(text: str) -> str:
    """`text` with ↵ before each line break, and all other control characters escaped."""
    return "↵\n".join(map(printable, text.split("\n")))
