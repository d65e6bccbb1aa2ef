"""Token ids as text."""

from typing import Any


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The exact text of token ids, including special tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    """`text` on one line, with line breaks and other control characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
