"""Special tokens: BOS and EOS around a document, and strings of special tokens inside it."""

import re
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError, tokenizer_errors

PROBE_TEXT = "probe"


class AddedTokens(NamedTuple):
    """Whether BOS goes before a document, and EOS after it."""

    bos: bool
    eos: bool


def choose_added_tokens(
    tokenizer: PreTrainedTokenizerBase, bos: Literal["auto", "always", "never"], append_eos: bool
) -> AddedTokens:
    """Choose BOS and EOS. The default follows the tokenizer.

    Raises:
        UserError: the tokenizer lacks a requested token, or adds other tokens, as encoders do.
    """
    if bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("--bos always: the tokenizer has no BOS token; use '--bos auto'")
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append_eos: the tokenizer has no EOS token; leave the flag out")
    default = default_added_tokens(tokenizer)
    return AddedTokens(bos == "always" or (bos == "auto" and default.bos), append_eos or default.eos)


def default_added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    """Special tokens added by the tokenizer itself, found by encoding `PROBE_TEXT`.

    Raises:
        UserError: it adds tokens other than BOS and EOS.
    """
    with tokenizer_errors():
        plain = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        full = tokenizer(PROBE_TEXT)["input_ids"]
    for added in (AddedTokens(bos, eos) for bos in (False, True) for eos in (False, True)):
        prefix, suffix = added_ids(tokenizer, added)
        if full == prefix + plain + suffix:
            return added
    raise UserError(
        f"--tokenizer {tokenizer.name_or_path}: adds tokens other than BOS and EOS to a text "
        f"({' '.join(tokenizer.convert_ids_to_tokens(full))}); give the tokenizer of a decoder-only model"
    )


def added_ids(tokenizer: PreTrainedTokenizerBase, added: AddedTokens) -> tuple[list[int], list[int]]:
    """Token ids before and after a document."""
    return [tokenizer.bos_token_id] * added.bos, [tokenizer.eos_token_id] * added.eos


def special_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The strings that a tokenizer takes for control tokens, such as `</s>`."""
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that finds strings of special tokens; None if there are none."""
    strings = special_strings(tokenizer)
    return re.compile("|".join(map(re.escape, strings))) if strings else None


def check_text_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can take strings of special tokens for ordinary text.

    Some find them all the same, because their vocabulary of ordinary text contains them.

    Raises:
        UserError: it cannot.
    """
    problem = f"--special_tokens text: the tokenizer {tokenizer.name_or_path}"
    if not tokenizer.is_fast:
        raise UserError(f"{problem} is not a fast one (tokenizer.json), which this needs; use '--special_tokens parse'")
    control = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    control.discard(tokenizer.unk_token_id)
    for string in special_strings(tokenizer):
        for text in (string, f"a{string}b", f"a {string} b"):
            with tokenizer_errors():
                ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if control.intersection(ids):
                raise UserError(
                    f"{problem} encodes {string!r} in ordinary text as a control token; use '--special_tokens parse'"
                )
