"""A tokenizer and tiny models.

Fixtures import torch and transformers, which the process that distributes the tests does not need.
"""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level BPE tokenizer without merges: 256 byte tokens, `<s>` = 256, `</s>` = 257; it adds neither.

    Byte ids follow the sorted byte-level alphabet, a permutation of the byte values.
    """
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def other_tokenizer(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test tokenizer with the ids of `!` and `"`, 0 and 1, exchanged."""
    path = tmp_path_factory.mktemp("other") / "tokenizer"
    shutil.copytree(tokenizer_dir, path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"!": 1, '"': 0}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def make_model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a Llama checkpoint with the test tokenizer and random weights, large enough to affect the losses.

    Attention heads have 32 dimensions, the minimum of vLLM on a CPU.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
            "max_position_embeddings": 256,
        }
        LlamaForCausalLM(LlamaConfig(**sizes | settings, initializer_range=0.2)).save_pretrained(path)
        shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
        return path

    return make


OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_own import OwnConfig
class OwnModel(LlamaModel):
    config_class = OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
OWN_CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


@pytest.fixture(scope="session")
def make_own_code(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """The checkpoint of `make_model` with Python code of its own, which transformers needs for model and tokenizer."""

    def make(seed: int = 0) -> Path:
        path = make_model(seed)
        for name, code in OWN_CODE.items():
            (path / name).write_text(code)
        changes = {
            "config.json": {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": OWN_CLASSES},
            "tokenizer_config.json": {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
            },
        }
        for name, change in changes.items():
            content = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps(content | change))
        return path

    return make


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skip if vLLM is not installed; in CI, fail instead."""
    if find_spec("vllm") is None:
        assert not os.environ.get("CI"), "CI must run with vLLM: install weighted-mtp[cpu]"
        pytest.skip("vLLM is not installed")
