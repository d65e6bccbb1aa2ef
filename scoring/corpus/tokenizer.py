"""The tokenizer of a corpus: loading it, and which special tokens go around a document."""

import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import TokenizerInfo
from weighted_mtp.schemas.storage.files import copy_files
from weighted_mtp.schemas.storage.locations import Location, local_name

PROBE = "probe"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer from a directory, which may be remote, or by its id.

    Raises:
        UserError: there is no such tokenizer, or it needs code of its own.
    """
    source = local_name(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    # What fails in there is up to the files: any of a dozen exception types, from OSError to KeyError.
    except Exception as error:
        raise UserError(
            f"--tokenizer {name}: cannot be loaded ({first_line(error)}); "
            "give a directory written by save_pretrained or a Hugging Face id"
        ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Location) -> None:
    """Write the tokenizer's files into `directory`.

    Raises:
        UserError: there is no room for temporary files.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:  # tokenizers raise bare Exception for a full disk
            raise UserError(f"{scratch}: cannot be written ({first_line(error)}); free some space and rerun") from error
        copy_files(Path(scratch), directory)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, directory: Location) -> TokenizerInfo:
    """What the manifest says about the tokenizer `name`, saved in `directory`."""
    return TokenizerInfo(
        name=name,
        fingerprint=tokenizer_fingerprint(tokenizer),
        files_sha256=directory_digest(directory),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class AddedTokens(NamedTuple):
    """Which special tokens go around a document."""

    bos: bool
    eos: bool


def choose_added_tokens(
    tokenizer: PreTrainedTokenizerBase, bos: Literal["auto", "always", "never"], append_eos: bool
) -> AddedTokens:
    """Decide on BOS and EOS: what the tokenizer adds by itself, unless the settings say otherwise.

    Raises:
        UserError: a token is asked for that the tokenizer does not have, or it adds others, as encoders do.
    """
    if bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no BOS token; use '--bos auto'")
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append_eos: the tokenizer has no EOS token; leave the flag out")
    own = tokens_added_by(tokenizer)
    return AddedTokens(bos == "always" or (bos == "auto" and own.bos), append_eos or own.eos)


def tokens_added_by(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    """Find out with a probe what the tokenizer adds to a text by itself."""
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(PROBE)["input_ids"]
    for added in (AddedTokens(bos, eos) for bos in (False, True) for eos in (False, True)):
        before, after = ids_around(tokenizer, added)
        if full == before + plain + after:
            return added
    raise UserError(
        f"--tokenizer {tokenizer.name_or_path}: adds tokens other than BOS and EOS to a text "
        f"({' '.join(tokenizer.convert_ids_to_tokens(full))}); give the tokenizer of a decoder-only model"
    )


def ids_around(tokenizer: PreTrainedTokenizerBase, added: AddedTokens) -> tuple[list[int], list[int]]:
    """The ids before and after a document."""
    return [tokenizer.bos_token_id] * added.bos, [tokenizer.eos_token_id] * added.eos
