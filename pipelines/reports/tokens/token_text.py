"""Token ids as text."""

from typing import Any

from weighted_mtp.schemas.errors import tokenizer_errors


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The exact text of token ids, including special tokens."""
    with tokenizer_errors():
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
