from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weighted_mtp.schemas.shard_set.shards import shard_schema
from weighted_mtp.scoring.corpus.documents import Fields, RowBatch
from weighted_mtp.scoring.corpus.tokenization import BatchEncoder, EncodedBatch

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int, bos: bool, eos: bool) -> EncodedBatch:
    encoder = BatchEncoder(tokenizer, [BOS] * bos, [EOS] * eos, max_length, Fields("text"))
    return encoder(RowBatch("source", [(row, {"text": text}) for row, text in enumerate(texts)]))


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
    assert encoded.documents["row"].tolist() == list(kept)
    assert encoded.documents["tokens"].tolist() == list(map(len, found.values()))
    assert encoded.documents["sequences"].sum() == encoded.table.num_rows
    assert encoded.documents["text_bytes"].tolist() == [len(text.encode()) for text in kept.values()]
    assert [reject.row for reject in encoded.rejects] == [row for row, text in enumerate(texts) if not text.strip()]


def test_every_sequence_carries_the_values_of_its_document(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = BatchEncoder(tokenizer, [], [], 2, Fields("text", None, ("reward", "length"), ("prompt",)))
    records = [
        {"text": "abc", "reward": 0.5, "length": 3, "prompt": 7},
        {"text": " ", "reward": 0.25, "length": 1, "prompt": "blank"},
        {"text": "d", "reward": -1, "length": 1, "prompt": "x"},
    ]
    table = encoder(RowBatch("source", list(enumerate(records)))).table
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


def test_text_on_which_a_tokenizer_fails_is_rejected(tokenizer_dir: Path) -> None:
    """The regular expression takes more steps for 60 x without a y than its library allows, which makes Rust panic."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    byte_level = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Split(Regex("(x+x+)+y"), "isolated"), byte_level])
    encoded = encode(tokenizer, ["ay", "x" * 60, "xa"], 9, bos=False, eos=False)
    assert encoded.table["input_ids"].to_pylist() == [byte_ids("ay"), byte_ids("xa")]
    [reject] = encoded.rejects
    assert (reject.row, reject.kind) == (1, "text on which the tokenizer fails")
    assert "retry-limit-in-match over" in reject.reason


def test_interruption_of_a_tokenizer_is_no_reject(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for interruption in (KeyboardInterrupt, SystemExit, MemoryError):
        monkeypatch.setattr(type(tokenizer), "__call__", Mock(side_effect=interruption))
        with pytest.raises(interruption):
            encode(tokenizer, ["a", "b"], 9, bos=False, eos=False)


def test_a_word_that_a_tokenizer_cannot_encode_is_rejected() -> None:
    words = Tokenizer(WordLevel({"known": 0}, unk_token="[UNK]"))
    encoded = encode(PreTrainedTokenizerFast(tokenizer_object=words), ["known", "new"], 9, bos=False, eos=False)
    assert encoded.table["input_ids"].to_pylist() == [[0]]
    [reject] = encoded.rejects
    assert reject.reason.startswith("text on which the tokenizer fails: WordLevel error: Missing [UNK]")


def test_documents_with_repeated_ids_become_rejects(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = BatchEncoder(tokenizer, [], [], 2, Fields("text", "id"))
    rows = [("a", "abc"), ("x", " "), ("b\n" * 200, "de"), ("c", "fghij")]
    batch = encoder(RowBatch("source", [(row, {"id": name, "text": text}) for row, (name, text) in enumerate(rows)]))
    left = batch.without_repeated(np.array([False, True, False]))
    assert left.table.select(["document_id", "start"]).to_pydict() == {
        "document_id": ["a", "a", "c", "c", "c"],
        "start": [0, 2, 0, 2, 4],
    }
    assert left.documents.tolist() == batch.documents[[0, 2]].tolist()
    assert [(reject.source, reject.row, reject.kind) for reject in left.rejects] == [
        ("source", 1, "empty text"),
        ("source", 2, "id of an earlier document"),
    ]
    assert left.rejects[1].reason == "id of an earlier document: " + "b\\n" * 100 + "..."
