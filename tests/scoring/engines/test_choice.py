from importlib.metadata import PackageNotFoundError

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.engines import choice
from weighted_mtp.scoring.engines.choice import choose_engine, choose_method, engine_version, runs_on_gpu


def test_auto_is_vllm_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    assert choose_engine("auto") == choose_engine("vllm") == "vllm"
    assert choose_engine("transformers") == "transformers"


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    with pytest.raises(UserError, match=r"weighted-mtp\[cuda\] or weighted-mtp\[cpu\]"):
        choose_engine("vllm")


def test_recurrent_models_are_scored_by_the_public_api():
    assert choose_method("auto", []) == choose_method("pooler", ["mamba"]) == "pooler"
    assert choose_method("auto", ["mamba"]) == choose_method("prompt_logprobs", []) == "prompt_logprobs"


def test_the_cpu_build_of_vllm_has_its_own_name(monkeypatch):
    def version(name: str) -> str:
        if name == "vllm":
            raise PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(choice, "version", version)
    assert engine_version("vllm") == "1.2.3"
    assert not runs_on_gpu("vllm")
    assert runs_on_gpu("transformers")
