"""The tokenizer of a new shard set: save it, and describe it in the manifest."""

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import TokenizerInfo
from weighted_mtp.schemas.storage.files import copy_files
from weighted_mtp.schemas.storage.locations import Location


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id plus 1, which is more than the number of tokens if some ids are left out."""
    return 1 + max(tokenizer.get_vocab().values())


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
        vocab_size=count_ids(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
