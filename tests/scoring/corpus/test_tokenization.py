from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shards import shard_schema
from weighted_mtp.scoring.corpus.documents import Batch, Fields
from weighted_mtp.scoring.corpus.tokenization import BatchEncoder, EncodedBatch
from weighted_mtp.scoring.corpus.tokenizer import choose_added_tokens, ids_around, load_tokenizer

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tokenizer_dir))


def with_template(tokenizer_dir: Path, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer, adding special tokens by itself as `template` says."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, bos: bool, eos: bool) -> EncodedBatch:
    encoder = BatchEncoder(tokenizer, [BOS] * bos, [EOS] * eos, max_length, Fields("text"))
    return encoder(Batch("source", [(row, {"text": text}) for row, text in enumerate(texts)]))


def byte_ids(text: str) -> list[int]:
    """Ids of the byte-level tokenizer without it: the rank of each byte's symbol in GPT-2's byte alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: byte for byte in printable}
    symbols |= {byte: 256 + rank for rank, byte in enumerate(b for b in range(256) if b not in symbols)}
    rank = {symbol: index for index, symbol in enumerate(sorted(symbols.values()))}
    return [rank[symbols[byte]] for byte in text.encode()]


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=6)


@given(texts=texts, max_length=st.integers(2, 9), bos=st.booleans(), eos=st.booleans())
def test_no_token_is_lost_or_moved(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, bos: bool, eos: bool
) -> None:
    encoded = encode(tokenizer, texts, max_length, bos, eos)
    found: dict[str, list[int]] = {}
    for row in encoded.table.to_pylist():
        document = found.setdefault(row["document_id"], [])
        assert row["start"] == len(document)
        assert len(document) % max_length == 0, "only the last sequence of a document may be short"
        assert 1 <= len(row["input_ids"]) <= max_length
        document += row["input_ids"]
    kept = {row: text for row, text in enumerate(texts) if text.strip()}
    assert found == {f"source#{row}": [BOS] * bos + byte_ids(text) + [EOS] * eos for row, text in kept.items()}
    assert encoded.documents == len(kept)
    assert encoded.tokens == sum(map(len, found.values()))
    assert encoded.text_bytes == sum(len(text.encode()) for text in kept.values())
    assert [reject.row for reject in encoded.rejects] == [row for row, text in enumerate(texts) if not text.strip()]


def test_every_sequence_carries_the_values_of_its_document(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = BatchEncoder(tokenizer, [], [], 2, Fields("text", None, ("reward", "length"), ("prompt",)))
    records = [
        {"text": "abc", "reward": 0.5, "length": 3, "prompt": 7},
        {"text": " ", "reward": 0.25, "length": 1, "prompt": "blank"},
        {"text": "d", "reward": -1, "length": 1, "prompt": "x"},
    ]
    table = encoder(Batch("source", list(enumerate(records)))).table
    assert table.schema.equals(shard_schema((), {"reward": "number", "length": "number", "prompt": "label"}))
    assert table.select(["start", "reward", "length", "prompt"]).to_pydict() == {
        "start": [0, 2, 0],
        "reward": [0.5, 0.5, -1],
        "length": [3, 3, 1],
        "prompt": ["7", "7", "x"],
    }


def test_bos_counts_towards_length_and_start(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode(tokenizer, ["abcde"], 4, bos=True, eos=True).table.to_pylist()
    a, b, c, d, e = byte_ids("abcde")
    assert [(row["start"], row["input_ids"]) for row in rows] == [(0, [BOS, a, b, c]), (4, [d, e, EOS])]


def test_length_that_fits_gives_no_empty_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, ["abcd" * 2], 4, bos=False, eos=False).table["start"].to_pylist() == [0, 4]


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
    ids = encode(tokenizer, ["ab"], 9, added.bos, added.eos).table["input_ids"].to_pylist()[0]
    assert ids == [BOS] * expected[0] + byte_ids("ab") + [EOS] * expected[1]


def test_auto_is_what_the_tokenizer_does(tokenizer_dir: Path) -> None:
    for template in ("$A", "<s> $A", "<s> $A </s>", "$A </s>"):
        tokenizer = with_template(tokenizer_dir, template)
        prefix, suffix = ids_around(tokenizer, choose_added_tokens(tokenizer, "auto", False))
        assert prefix + byte_ids("ab") + suffix == tokenizer("ab")["input_ids"]


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


def test_saved_truncation_and_padding_do_not_apply(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    ids = encode(tokenizer, ["abcde", "f"], 9, bos=False, eos=False).table["input_ids"].to_pylist()
    assert ids == [byte_ids("abcde"), byte_ids("f")]


def test_text_that_a_tokenizer_drops_is_rejected(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.normalizer = Replace("x", "")
    encoded = encode(tokenizer, ["xx", "xay", ""], 9, bos=True, eos=False)
    assert encoded.table["input_ids"].to_pylist() == [[BOS, *byte_ids("ay")]]
    assert [(reject.row, reject.reason) for reject in encoded.rejects] == [
        (0, "text without tokens"),
        (2, "empty text"),
    ]


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizer_that_cannot_be_loaded(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer .*cannot be loaded") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
