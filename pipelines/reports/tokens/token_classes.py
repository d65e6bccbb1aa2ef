"""Classifies token ids: start of a word, digits, punctuation, and so on."""

from typing import Any

import numpy as np

from weighted_mtp.pipelines.reports.tokens.token_text import decode
from weighted_mtp.schemas.errors import tokenizer_errors

CLASSES = (
    "word start",
    "word continuation",
    "digits",
    "punctuation",
    "space, line break",
    "part of a character",
    "special",
)
"""A word start has a leading space. Words at the start of a line or after a bracket count as continuations."""


def classify(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Index in `CLASSES` of each token id, (K,) from (K,)."""
    special = set(tokenizer.all_special_ids)
    texts = token_texts(tokenizer, ids)
    pairs = zip(ids.tolist(), texts, strict=True)
    names = ["special" if index in special else class_of(text) for index, text in pairs]
    return np.array([CLASSES.index(name) for name in names], dtype=np.int64)


def class_of(text: str) -> str:
    """The class of a token with this text."""
    word = text.strip()
    if not text or "\ufffd" in text:
        return "part of a character"
    if not word:
        return "space, line break"
    if any(char.isalpha() for char in word):
        return "word start" if text[0].isspace() else "word continuation"
    return "digits" if any(char.isnumeric() for char in word) else "punctuation"


def token_texts(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """The text of each id, with U+FFFD for partial characters.

    Decodes each id after a letter: some tokenizers drop the space before the first word of a text.
    """
    with tokenizer_errors():
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        lead = decode(tokenizer, before)
        pairs = [[*before, index] for index in ids.tolist()]
        texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False) if pairs else []
    return [text[len(lead) :] if text.startswith(lead) else text for text in texts]
