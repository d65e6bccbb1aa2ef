"""Text with the weights of its tokens: as shades where there are colours, and as marks everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from weighted_mtp.pipelines.reports.token_text import decode, printable

LEGEND = (
    "‹no weight, or less than half of the mean of those that have one›  as usual  «at least twice the mean»  "
    "-‹negative›-"
)


@dataclass(frozen=True)
class Excerpt:
    """Tokens that follow each other in a document.

    Attributes:
        document_id: name of the document.
        position: of the first of the tokens in the document.
        ids: (T,) token ids.
        weights: (T,) float32, NaN where a token is no target.
        begins: whether the sequence begins here.
        ends: whether it ends here.
    """

    document_id: str
    position: int
    ids: np.ndarray
    weights: np.ndarray
    begins: bool
    ends: bool


class Piece(NamedTuple):
    """The text of a token, or of a few that only together are text, and their mean weight."""

    text: str
    weight: float


class Look(NamedTuple):
    """How a weight is shown."""

    opening: str
    closing: str
    style: str


PLAIN = Look("", "", "")
DROPPED = Look("‹", "›", "dim")
POSITIVE = (
    (0.5, Look("‹", "›", "black on #e5f5e0")),
    (1.0, Look("", "", "black on #c7e9c0")),
    (2.0, Look("", "", "black on #a1d99b")),
    (4.0, Look("«", "»", "black on #74c476")),
    (np.inf, Look("«", "»", "black on #31a354")),
)
"""Looks of weights below a multiple of the typical one."""
NEGATIVE = ((1.0, Look("-‹", "›-", "black on #fcbba1")), (np.inf, Look("-‹", "›-", "black on #fb6a4a")))


def look_of(weight: float, typical: float) -> Look:
    """How to show a weight where the mean absolute weight, of tokens that have one, is `typical`."""
    if np.isnan(weight):
        return PLAIN
    if weight == 0:
        return DROPPED
    looks = POSITIVE if weight > 0 else NEGATIVE
    # Weights of one value are exactly their mean, up to rounding.
    return next(look for below, look in looks if abs(weight) < below * typical * (1 - 1e-6))


def marked(excerpt: Excerpt, tokenizer: Any, typical: float) -> Text:
    """The text of an excerpt; runs of tokens with the same mark are marked together."""
    text = Text("" if excerpt.begins else "… ", overflow="fold")
    looks = [(piece, look_of(piece.weight, typical)) for piece in pieces(tokenizer, excerpt)]
    for (opening, closing), run in groupby(looks, key=lambda pair: pair[1][:2]):
        first, *rest = run
        words = first[0].text.lstrip(" ")
        if words:  # spaces before a marked word stay outside
            text.append(first[0].text[: -len(words)], first[1].style)
        text.append(opening, "bold")
        text.append(visible(words or first[0].text), first[1].style)
        for piece, look in rest:
            text.append(visible(piece.text), look.style)
        text.append(closing, "bold")
    return text.append("" if excerpt.ends else " …")


def pieces(tokenizer: Any, excerpt: Excerpt) -> Iterator[Piece]:
    """The text of the tokens one after the other; those of one character together."""
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
    """`text` with its line breaks, each after a sign for it, and with all other control characters escaped."""
    return "↵\n".join(map(printable, text.split("\n")))
