"""Prompts: a fixed, unscored text before every sequence."""

from dataclasses import dataclass

import numpy as np

from weighted_mtp.schemas.errors import UserError, tokenizer_errors
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text and its token ids in the tokenizer of the corpus."""

    text: str
    input_ids: tuple[int, ...]

    def before(self, ids: np.ndarray, bos_token_id: int | None) -> tuple[np.ndarray, int]:
        """Insert the prompt before a sequence, after its BOS if it starts with one.

        Args:
            ids: token ids of the sequence, int32, at least one.
            bos_token_id: id of BOS, if the tokenizer has one.

        Returns:
            Token ids, int32, and the position of the first token of the sequence that has context.
        """
        starts = int(ids[0] == bos_token_id)
        prompted = np.concatenate([ids[:starts], np.asarray(self.input_ids, np.int32), ids[starts:]])
        return prompted, len(self.input_ids) + starts


def make_prompt(text: str, flag: str, source: ShardSet) -> Prompt | None:
    """Tokenise a prompt with the tokenizer of the corpus, without special tokens. None for an empty text.

    Raises:
        UserError: the text has no tokens, or the tokenizer fails on it.
    """
    if not text:
        return None
    tokenizer = load_corpus_tokenizer(source)
    with tokenizer_errors(f"{flag}: the corpus's tokenizer"):
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    if not ids:
        raise UserError(f"{flag}: the corpus's tokenizer gives no tokens for {text!r}; leave it out")
    return Prompt(text, tuple(ids))
