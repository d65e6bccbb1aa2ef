import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weighted_mtp.schemas.configs.prepare import SpecialTokens
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import tokenizer_fingerprint
from weighted_mtp.scoring.corpus.documents import Fields, RowBatch
from weighted_mtp.scoring.corpus.special_tokens import added_ids, check_text_mode, choose_added_tokens
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


WORDS = ["the fox </s jumps over> <s", "<tool> and < / s > dogs", "s> </ abc"] * 9
UNKNOWN, START, END = "<unk>", "<s>", "</s>"


def train(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a kind with special tokens, and the token `<tool>`, which is added but not special."""
    settings: dict[str, Any] = {"special_tokens": [UNKNOWN, START, END], "show_progress": False}
    if kind == "byte-level":
        backend = Tokenizer(models.BPE(ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300, **settings)
    elif kind == "sentencepiece":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.BpeTrainer(vocab_size=60, **settings)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=40, unk_token=UNKNOWN, **settings)
    else:
        backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**settings)
    backend.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END, unk_token=UNKNOWN)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


TEXTS = ["</s>", "a</s>b", "<s> <tool></s> </s>", "a <unk> b", "the fox"]


def encode(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens) -> list[list[int]]:
    encoder = BatchEncoder(tokenizer, [], [], 99, Fields("text"), special_tokens)
    return (
        encoder(RowBatch("source", [(row, {"text": text}) for row, text in enumerate(TEXTS)]))
        .table["input_ids"]
        .to_pylist()
    )


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_special_tokens_as_text_are_what_a_tokenizer_without_them_gives(kind: str) -> None:
    tokenizer = train(kind)
    check_text_mode(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    oracle = Tokenizer.from_str(json.dumps(content))
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in TEXTS]
    before = tokenizer_fingerprint(tokenizer)
    ids = encode(tokenizer, "text")
    assert ids == expected
    assert tokenizer.convert_tokens_to_ids("<tool>") in ids[2]
    assert not {1, 2}.intersection(*ids)
    parsed = encode(tokenizer, "parse")
    assert parsed == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert parsed[0] == [2]
    assert parsed[4] == ids[4]
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_tokenizers_that_find_special_tokens_in_ordinary_text_are_refused(kind: str) -> None:
    tokenizer = train(kind)
    assert 2 in encode(tokenizer, "text")[0]
    with pytest.raises(UserError, match="encodes '</s>' in ordinary text as a control token; use '--special_tokens pa"):
        check_text_mode(tokenizer)


def test_ids_of_bytes_of_special_tokens_as_text(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    check_text_mode(tokenizer)
    encoded = encode(tokenizer, "text")[1]
    assert "".join(tokenizer.convert_ids_to_tokens(encoded)) == "a</s>b"
    assert encode(tokenizer, "parse")[1] == [encoded[0], EOS, encoded[-1]]


def test_documents_with_special_tokens_and_two_bos_are_counted(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = ["<s>a", "<s><s>a", "a<s>", "</s>", "a", "<s", "\n"]
    batch = RowBatch("source", [(row, {"text": text}) for row, text in enumerate(texts)])
    counts = {
        (mode, len(prefix)): (int(documents["double_bos"].sum()), int(documents["with_special_tokens"].sum()))
        for mode in ("parse", "text")
        for prefix in ([], [BOS])
        for documents in [BatchEncoder(tokenizer, prefix, [], 99, Fields("text"), mode)(batch).documents]
    }
    assert counts == {("parse", 0): (1, 4), ("parse", 1): (2, 4), ("text", 0): (0, 4), ("text", 1): (0, 4)}
