from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weighted_mtp.pipelines.reports.tokens.token_classes import CLASSES, class_of, classify, token_texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "word start"),
        ("\nThe", "word start"),
        ("ing", "word continuation"),
        ("'s", "word continuation"),
        (" (a", "word start"),
        ("\u4e2d", "word continuation"),
        ("42", "digits"),
        (" 7", "digits"),
        ("1.5", "digits"),
        ("x1", "word continuation"),
        (").", "punctuation"),
        (" +", "punctuation"),
        ("\U0001f30d", "punctuation"),
        (" ", "space, line break"),
        ("\n\n", "space, line break"),
        ("", "part of a character"),
        ("\ufffd", "part of a character"),
    ],
)
def test_class_of_a_text(text: str, expected: str) -> None:
    assert class_of(text) == expected


def names(tokenizer: PreTrainedTokenizerFast, symbols: list[str]) -> list[str]:
    ids = np.array(tokenizer.convert_tokens_to_ids(symbols))
    return [CLASSES[index] for index in classify(tokenizer, ids)]


def test_bytes_of_a_byte_level_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    symbols = ["a", "\u0120", "\u010a", "3", "?", "\u00c3", "<s>"]
    assert names(tokenizer, symbols) == [
        "word continuation", "space, line break", "space, line break", "digits", "punctuation", "part of a character",
        "special",
    ]  # fmt: skip


def test_spaces_before_words_are_seen_in_every_kind_of_tokenizer() -> None:
    """Decoders of SentencePiece models leave out the space before a first word, those of WordPiece write none."""
    vocabulary = {symbol: index for index, symbol in enumerate(["\u2581the", "the", "a", "\u2581a", "\u2581", "<unk>"])}
    sentencepiece = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace()
    sentencepiece.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece, unk_token="<unk>")
    assert token_texts(tokenizer, np.array([0, 1])) == [" the", "the"]
    assert names(tokenizer, ["\u2581the", "the", "\u2581", "<unk>"]) == [
        "word start", "word continuation", "space, line break", "special",
    ]  # fmt: skip
    wordpiece = Tokenizer(models.WordPiece({"a": 0, "the": 1, "##ing": 2, "[UNK]": 3}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]")
    assert token_texts(tokenizer, np.array([1, 2])) == [" the", "ing"]
