import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weighted_mtp.schemas.configs import PrepareConfig
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer
from weighted_mtp.scoring.corpus.byte_tokenizer import make_byte_tokenizer
from weighted_mtp.scoring.corpus.prepare import prepare

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_byte_tokenizer()


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_are_the_bytes_of_a_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == [BOS, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (BOS, EOS, 258)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one("a<eos>")["input_ids"] == [BOS, ord("a"), EOS]
        assert one("a<eos>", split_special_tokens=True)["input_ids"] == [BOS, *b"a<eos>"]


def test_a_corpus_of_bytes(tmp_path: Path) -> None:
    texts = ["one €", "two\r\n <bos>", " \u0000\U0001f600"]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"append_eos": True, "special_tokens": "text", "workers": 1}
    prepared = prepare(
        PrepareConfig(input=str(tmp_path / "corpus.jsonl"), tokenizer="bytes", output=tmp_path / "out", **settings)
    )
    assert prepared.read(0)["input_ids"].to_pylist() == [[BOS, *text.encode(), EOS] for text in texts]
    info = prepared.manifest.tokenizer
    assert (info.name, info.vocab_size, info.bos_token_id, info.eos_token_id) == ("bytes", 258, BOS, EOS)
    assert load_corpus_tokenizer(prepared)("€")["input_ids"] == [BOS, *"€".encode()]
    assert [check.fault for check in verify(prepared.path, prepared.manifest) if check.fault] == []
