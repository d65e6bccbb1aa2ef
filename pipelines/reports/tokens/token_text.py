"""Token ids as text."""

from typing import Any


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The exact text of token ids, including special tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
