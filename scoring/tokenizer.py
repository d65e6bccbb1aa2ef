"""Load and save Hugging Face tokenizers, and describe them in a manifest."""

import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import TokenizerInfo
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import copy_files
from weighted_mtp.schemas.storage.locations import Location, is_missing_directory, local_copy


def load_tokenizer(source: str | Path, problem: str, remedy: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or by its Hugging Face id.

    Args:
        source: directory or id.
        problem: beginning of the error message.
        remedy: end of the error message.

    Raises:
        UserError: the tokenizer is missing, is damaged, or needs custom code.
    """
    if is_missing_directory(source):
        raise UserError(f"{problem} (no such directory); check the path")
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a dozen types from OSError to KeyError, and bare Exception
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error


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
