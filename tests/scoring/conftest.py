"""Tiny checkpoints with random weights, and what a test needs to know about vLLM."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MAX_LENGTH = 256
VLLM = find_spec("vllm") is not None


@pytest.fixture(scope="session")
def make_model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a Llama checkpoint with random weights that matter, and the test tokenizer.

    Its heads have 32 dimensions, the fewest that vLLM supports on a CPU.
    """

    def make(seed: int = 0, **settings: int) -> Path:
        path = tmp_path_factory.mktemp("model") / f"llama-{seed}"
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": MAX_LENGTH,
        }
        LlamaForCausalLM(LlamaConfig(**sizes | settings, initializer_range=0.2)).save_pretrained(path)
        shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
        return path

    return make


@pytest.fixture(scope="session")
def reference_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the reference."""
    return make_model(seed=0)


@pytest.fixture(scope="session")
def base_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the base."""
    return make_model(seed=1)


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skip where vLLM is not installed, except in CI: there it must be."""
    if not VLLM:
        assert not os.environ.get("CI"), "CI must run with vLLM: install weighted-mtp[cpu]"
        pytest.skip("vLLM is not installed")
