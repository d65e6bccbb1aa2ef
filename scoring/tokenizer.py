"""The tokenizer of a shard set: load, save, describe in the manifest."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.pretrained import load_tokenizer
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import TokenizerInfo
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import copy_files
from weighted_mtp.schemas.storage.locations import Location, local_copy


def load_corpus_tokenizer(shards: ShardSet) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored in a shard set."""
    path = shards.tokenizer_path
    return load_tokenizer(local_copy(path), f"{path}: cannot be loaded", "restore it or rewrite the set")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Location) -> None:
    """Write the tokenizer's files into `directory`.

    Raises:
        UserError: no space for temporary files.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # tokenizers raises bare Exception if the disk is full
            raise UserError(f"{scratch}: cannot be written ({first_line(error)}); free some space and rerun") from error
        copy_files(Path(scratch), directory)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, directory: Location) -> TokenizerInfo:
    """Manifest entry of the tokenizer `name` with its files in `directory`."""
    return TokenizerInfo(
        name=name,
        fingerprint=tokenizer_fingerprint(tokenizer),
        files_sha256=directory_digest(directory),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
