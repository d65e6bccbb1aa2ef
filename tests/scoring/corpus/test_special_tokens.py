from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.corpus.documents import Fields, RowBatch
from weighted_mtp.scoring.corpus.special_tokens import added_ids, choose_added_tokens
from weighted_mtp.scoring.corpus.tokenization import BatchEncoder

BOS, EOS = 256, 257


def with_template(tokenizer_dir: Path, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, adding special tokens by itself as `template` says."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.mark.parametrize(
    ("template", "bos", "append_eos", "expected"),
    [
        ("$A", "auto", False, (False, False)),
        ("$A", "always", False, (True, False)),
        ("$A", "never", True, (False, True)),
        ("<s> $A", "auto", False, (True, False)),
        ("<s> $A", "auto", True, (True, True)),
        ("<s> $A", "never", False, (False, False)),
        ("<s> $A </s>", "auto", False, (True, True)),
        ("<s> $A </s>", "never", False, (False, True)),
        ("$A </s>", "always", True, (True, True)),
    ],
)
def test_added_tokens(
    template: str, bos: str, append_eos: bool, expected: tuple[bool, bool], tokenizer_dir: Path
) -> None:
    tokenizer = with_template(tokenizer_dir, template)
    added = choose_added_tokens(tokenizer, bos, append_eos)
    assert added == expected
    encoder = BatchEncoder(tokenizer, *added_ids(tokenizer, added), 9, Fields("text"))
    ids = encoder(RowBatch("source", [(0, {"text": "ab"})])).table["input_ids"].to_pylist()[0]
    plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert ids == [BOS] * expected[0] + plain + [EOS] * expected[1]


def test_auto_follows_the_tokenizer(tokenizer_dir: Path) -> None:
    for template in ("$A", "<s> $A", "<s> $A </s>", "$A </s>"):
        tokenizer = with_template(tokenizer_dir, template)
        prefix, suffix = added_ids(tokenizer, choose_added_tokens(tokenizer, "auto", False))
        plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
        assert prefix + plain + suffix == tokenizer("ab")["input_ids"]


def test_missing_special_tokens_and_encoders_are_refused(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.bos_token = tokenizer.eos_token = None
    assert choose_added_tokens(tokenizer, "auto", False) == (False, False)
    with pytest.raises(UserError, match="--bos always"):
        choose_added_tokens(tokenizer, "always", False)
    with pytest.raises(UserError, match="--append_eos"):
        choose_added_tokens(tokenizer, "auto", True)
    with pytest.raises(UserError, match="decoder-only"):
        choose_added_tokens(with_template(tokenizer_dir, "</s> $A <s>"), "auto", False)
