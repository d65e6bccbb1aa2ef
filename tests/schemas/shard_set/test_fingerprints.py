import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import digest_json, model_fingerprint, tokenizer_fingerprint


def write_model(path: Path, config: str = "{}", weights: bytes = b"weights") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_digest_ignores_the_order_of_keys_but_not_of_items() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_a_model_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    first = model_fingerprint(write_model(tmp_path / "first"))
    (write_model(tmp_path / "copy") / "README.md").write_text("notes")
    assert model_fingerprint(tmp_path / "copy") == first
    assert model_fingerprint(write_model(tmp_path / "config", config='{"a": 1}')) != first
    assert model_fingerprint(write_model(tmp_path / "weights", weights=b"other")) != first


def test_code_of_another_repository_counts_if_it_may_run(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "modeling.py").write_text("one = 1")
    model = write_model(tmp_path / "model", config=json.dumps({"auto_map": {"AutoModel": f"{code}--modeling.Own"}}))
    before = [model_fingerprint(model, code=may_run) for may_run in (False, True)]
    (code / "modeling.py").write_text("one = 2")
    after = [model_fingerprint(model, code=may_run) for may_run in (False, True)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
    shutil.rmtree(code)
    with pytest.raises(UserError, match=f"/model: needs Python code of {code}, which is not available from the"):
        model_fingerprint(model, code=True)


@pytest.mark.parametrize(("missing", "named"), [("config.json", "config.json"), ("model.safetensors", "weight files")])
def test_an_incomplete_model_is_refused(tmp_path: Path, missing: str, named: str) -> None:
    path = write_model(tmp_path / "model")
    (path / missing).unlink()
    with pytest.raises(UserError, match=f"no {named}"):
        model_fingerprint(path)


def test_a_tokenizer_is_known_by_how_it_maps_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=2, padding=False)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before

    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) != before
