"""The tokenizer of a shard set, and its comparison with those of models and of other sets."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import OwnCodeError, load_tokenizer
from weighted_mtp.schemas.shard_set.fingerprints import digest_json, tokenizer_content, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import local_copy


def load_corpus_tokenizer(shards: ShardSet) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored in a shard set. Python code stored with it never runs.

    Raises:
        OwnCodeError: it needs that code.
        UserError: it cannot be loaded for another reason.
    """
    path = shards.tokenizer_path
    problem = f"{path}: cannot be loaded"
    try:
        return load_tokenizer(local_copy(path), problem, "restore it or rewrite the set")
    except OwnCodeError as error:
        raise OwnCodeError(
            f"{problem} (it needs Python code, which never runs from a shard set); "
            "to see texts and to use prompts, prepare the corpus with a tokenizer without code"
        ) from error


def fits(tokenizer: Any, shards: ShardSet) -> bool:
    """Whether a loaded tokenizer splits text like that of a set, with the same token for each id that the set can have.

    It may have other tokens beyond the largest id of the set, such as an added padding token.

    Raises:
        UserError: the tokenizer of the set cannot be loaded, or a shard is damaged.
    """
    if tokenizer_fingerprint(tokenizer) == shards.manifest.tokenizer.fingerprint:
        return True
    first = first_difference(load_corpus_tokenizer(shards), tokenizer)
    return first is None or shards.largest_id < first


def check_same_tokenizer(shards: ShardSet, other: ShardSet) -> None:
    """Check that the tokenizers of two shard sets agree on the ids that occur in them.

    Raises:
        UserError: they do not agree, or one cannot be loaded.
    """
    if shards.manifest.tokenizer.fingerprint == other.manifest.tokenizer.fingerprint:
        return
    first = first_difference(load_corpus_tokenizer(shards), load_corpus_tokenizer(other))
    if first is not None and first <= max(shards.largest_id, other.largest_id):
        raise UserError(f"{other.path}: its tokenizer is not that of {shards.path}; prepare both with the same one")


def first_difference(one: Any, other: Any) -> int | None:
    """The smallest id for which two Hugging Face tokenizers have different tokens; None if there is none.

    It is 0 if they split text in different ways: by other merges, another normaliser or another pre-tokeniser.
    """
    (rules, tokens), (other_rules, other_tokens) = map(rules_and_tokens, (one, other))
    if rules != other_rules:
        return 0
    return min((token_id for token_id, _ in tokens ^ other_tokens), default=None)


def rules_and_tokens(tokenizer: Any) -> tuple[str, set[tuple[int, str]]]:
    """Digest of the way in which a tokenizer splits text, and its tokens: their ids, and what they are."""
    content = tokenizer_content(tokenizer)
    vocabulary = (content if "vocab" in content else content["model"]).pop("vocab")
    if isinstance(vocabulary, dict):
        tokens = {(token_id, token) for token, token_id in vocabulary.items()}
    else:  # of Unigram: pieces and their scores, by id
        tokens = {(token_id, json.dumps(piece)) for token_id, piece in enumerate(vocabulary)}
    added = content.pop("added_tokens", [])
    tokens |= {(token["id"], json.dumps(token, sort_keys=True)) for token in added}
    return digest_json(content), tokens
