"""The scorer inside vLLM against transformers, on every kind of model that can be built tiny."""

import json
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request, load_engine
from weighted_mtp.scoring.engines.vllm_plugin import SCORE_TOKENS, register

TOLERANCE = 1e-4
SIZES = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 1, "initializer_range": 0.2} | {
    "max_position_embeddings": 256
}
WIDE = {"head_dim": 32}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT = {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-tied-biased": ("Llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2-tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | WIDE),
    "mistral-sliding": ("Mistral", LLAMA | WIDE | {"sliding_window": 32}),
    "gemma": ("Gemma", LLAMA | WIDE),
    "gemma2-capped": ("Gemma2", LLAMA | WIDE | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", LLAMA | WIDE | {"sliding_window": 32}),
    "phi-biased-head": ("Phi", NEOX),
    "phi3": ("Phi3", LLAMA | {"pad_token_id": 0}),
    "helium-without-a-class-in-vllm": ("Helium", LLAMA | {"head_dim": 32}),
    "olmo": ("Olmo", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "gpt-neox": ("GPTNeoX", NEOX),
    "gpt2": ("GPT2", GPT),
    "granite-scaled": ("Granite", LLAMA | {"logits_scaling": 4.0}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
}
QUICK = ("llama", "qwen2-tied", "gemma2-capped", "phi-biased-head", "helium-without-a-class-in-vllm", "gpt2", "mixtral")
"""Models that differ most from each other; the others are tested by `make test-slow`."""
LENGTHS = (40, 2, 256, 100, 33, 1, 256)
FIRST_SCORED = (0, 0, 200, 7, 32, 0, 1)

pytestmark = pytest.mark.usefixtures("vllm_installed")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 258, length).astype(np.int32) for length in LENGTHS]
    return [
        Request(ids, first, ("loss", "entropy") if row % 2 == 0 else ("loss",))
        for row, (ids, first) in enumerate(zip(sequences, FIRST_SCORED, strict=True))
    ]


@pytest.fixture
def engine() -> Callable[..., Engine]:
    """Load engines and keep them until the end of the test: vLLM takes down what all engines of a process share."""
    kept = []

    def load(model: Path, name: str = "vllm", **settings: object) -> Engine:
        defaults = {"method": "pooler" if name == "vllm" else None, "dtype": "float32", "batch_tokens": 48}
        kept.append(load_engine(model, EngineConfig(name, **defaults | settings, max_length=256, threads=1)))
        return kept[-1]

    return load


def make_checkpoint(name: str, path: Path) -> Path:
    kind, sizes = MODELS[name]
    config_class = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))
    model_class = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))
    torch.manual_seed(0)
    model = model_class(config_class(**sizes))
    for parameter, values in model.named_parameters():
        if "bias" in parameter:
            torch.nn.init.normal_(values, std=0.5)
    model.save_pretrained(path)
    return path


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Largest absolute difference; NaN must be at the same places."""
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    return max(float(np.nanmax(np.abs(a - b), initial=0)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_losses_and_entropies_equal_transformers(name, engine, requests, tmp_path):
    """In chunks that are shorter than most sequences."""
    model = make_checkpoint(name, tmp_path)
    expected = engine(model, "transformers").score(requests)
    assert largest_difference(engine(model).score(requests), expected) < TOLERANCE


def test_entropies_equal_the_definition(engine, requests, reference_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(reference_model).eval()
    for scores, request in zip(engine(reference_model, "transformers").score(requests), requests, strict=True):
        if "entropy" not in request.quantities or len(request.input_ids) < 2:
            continue
        with torch.inference_mode():
            ids = torch.from_numpy(request.input_ids.astype(np.int64))
            log_probabilities = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        expected = -(log_probabilities.exp() * log_probabilities).sum(-1).numpy()
        known = scores[1][max(0, 1 - request.first_scored) :]
        np.testing.assert_allclose(known, expected[-len(known) :], rtol=0, atol=TOLERANCE)


def test_results_depend_on_no_batch_no_chunk_and_no_order(engine, requests, reference_model, monkeypatch):
    expected = engine(reference_model, batch_tokens=8192).score(requests)
    for batch_tokens in (17, 300):
        assert largest_difference(engine(reference_model, batch_tokens=batch_tokens).score(requests), expected) < 1e-5
    assert largest_difference(engine(reference_model).score(requests[::-1])[::-1], expected) < 1e-5
    monkeypatch.setattr("weighted_mtp.scoring.engines.vllm_scorer.LEAST_ROWS", 1)
    monkeypatch.setattr("weighted_mtp.scoring.engines.vllm_scorer.CACHED_LOGITS_BYTES", 4 * 260 * 7)
    assert largest_difference(engine(reference_model, batch_tokens=8192).score(requests), expected) < 1e-5


def test_only_scored_rows_reach_the_head(engine, reference_model, monkeypatch):
    ids = np.arange(200, dtype=np.int32)
    loaded = engine(reference_model, batch_tokens=8192)
    rows = []
    from weighted_mtp.scoring.engines.vllm_scorer import TokenScorer

    original = TokenScorer.score

    def count(self: object, hidden_states: object, wanted: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(wanted))
        return original(self, hidden_states, wanted, *rest)

    monkeypatch.setattr(TokenScorer, "score", count)
    loaded.score([Request(ids, 150)])
    assert sum(rows) == 50


def test_preempted_requests_start_anew(engine, reference_model):
    """A cache for half of what runs at once: vLLM drops requests half-way and computes them again."""
    rng = np.random.default_rng(1)
    requests = [Request(rng.integers(0, 258, 256).astype(np.int32)) for _ in range(8)]
    expected = engine(reference_model, "transformers").score(requests)
    blocks = 4 * 128 * 2 * 2 * 1 * 32 * 4  # 4 of 128 tokens, with keys and values of 2 layers, 1 head of 32 floats
    tight = engine(
        reference_model,
        batch_tokens=96,
        engine_args={"long_prefill_token_threshold": 16, "kv_cache_memory_bytes": blocks},
    )
    preempted = []
    scheduler = tight.engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    assert largest_difference(tight.score(requests), expected) < TOLERANCE
    assert preempted, "otherwise this test shows nothing"


def test_bfloat16_stays_near_float32(engine, requests, tmp_path):
    """Logits are float32 in any case: what is lost is lost in the layers."""
    model = make_checkpoint("qwen2-tied", tmp_path)
    expected = engine(model, "transformers").score(requests)
    scores = engine(model, dtype="bfloat16").score(requests)
    differences = np.concatenate([(a - b).ravel() for a, b in zip(scores, expected, strict=True)])
    assert 0 < np.sqrt(np.nanmean(differences**2)) < 0.05


def test_quantised_checkpoint(engine, requests, reference_model, tmp_path):
    """Weights and activations in 8 bits, as compressed-tensors stores them, against vLLM's public API."""
    weights = {}
    for name, tensor in load_file(reference_model / "model.safetensors").items():
        weights[name] = tensor
        if name.endswith("_proj.weight"):
            weights[f"{name}_scale"] = scale = tensor.abs().amax(1, keepdim=True) / 127
            weights[name] = (tensor / scale).round().to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((reference_model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    losses = [Request(request.input_ids, request.first_scored) for request in requests]
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)  # vLLM's own, where an engine replaced it before
    expected = engine(tmp_path, method="prompt_logprobs").score(losses)
    scores = engine(tmp_path).score(losses)
    assert largest_difference(scores, expected) < TOLERANCE
    assert largest_difference(scores, engine(reference_model).score(losses)) > 0.1, "nothing was quantised"


def test_plugin_leaves_vllm_alone_unless_it_is_asked(monkeypatch):
    from vllm.model_executor.models import ModelRegistry

    monkeypatch.delenv(SCORE_TOKENS, raising=False)
    before = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == before


def test_plugin_is_what_vllm_finds():
    (entry,) = entry_points(group="vllm.general_plugins", name="weighted_mtp")
    assert entry.load() is register


def test_positions_of_models_with_two_embeddings_of_them(engine, requests, tmp_path):
    """LongRoPE: the longest sequence has the length up to which the short factors hold."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_type": "longrope", "rope_theta": 10000.0}
    sizes = LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = transformers.Phi3Config(**sizes, rope_parameters=factors | {"original_max_position_embeddings": 256})
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    expected = engine(tmp_path, "transformers").score(requests)
    assert largest_difference(engine(tmp_path).score(requests), expected) < TOLERANCE


@pytest.mark.slow
def test_tensor_parallel(engine, requests, reference_model, monkeypatch):
    """Two processes share the model; the plugin reaches them through its entry point."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    expected = engine(reference_model, "transformers").score(requests)
    scores = engine(reference_model, tensor_parallel_size=2).score(requests)
    assert largest_difference(scores, expected) < TOLERANCE
