"""Token ids as text."""

from typing import Any

from transformers import AutoTokenizer

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import local_copy


def load_tokenizer(shards: ShardSet) -> Any:
    """The tokenizer that a shard set carries."""
    return AutoTokenizer.from_pretrained(local_copy(shards.tokenizer_path))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The exact text of token ids, including special tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    """`text` on one line, with line breaks and other control characters escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
