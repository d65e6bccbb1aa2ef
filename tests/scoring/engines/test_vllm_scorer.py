"""The scorer inside vLLM against transformers, on every kind of model that can be built tiny."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from weighted_mtp.scoring.engines.base import Request

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
QUICK = ("qwen2-tied", "gemma2-capped", "phi-biased-head", "mixtral")
"""Models that differ most from each other; the others are tested by `make test-slow`."""

pytestmark = pytest.mark.usefixtures("vllm_installed")


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_losses_and_entropies_equal_transformers(name, make_engine, requests, tmp_path, largest_difference):
    """In chunks that are shorter than most sequences."""
    model = make_checkpoint(name, tmp_path)
    expected = make_engine(model, "transformers").score(requests)
    assert largest_difference(make_engine(model).score(requests), expected) < TOLERANCE


def test_a_model_with_code_of_its_own_is_refused(make_engine, make_own_code):
    """vLLM runs its layers and its output matrix alone, without a scale or a cap in its forward()."""
    with pytest.raises(ValueError, match="vLLM would not run the code of its output layer"):
        make_engine(make_own_code(), trust_remote_code=True)


def test_entropies_equal_the_definition(make_engine, requests, reference_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(reference_model).eval()
    for scores, request in zip(make_engine(reference_model, "transformers").score(requests), requests, strict=True):
        if "entropy" not in request.quantities or len(request.input_ids) < 2:
            continue
        with torch.inference_mode():
            ids = torch.from_numpy(request.input_ids.astype(np.int64))
            log_probabilities = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        expected = -(log_probabilities.exp() * log_probabilities).sum(-1).numpy()
        known = scores[1][max(0, 1 - request.first_scored) :]
        np.testing.assert_allclose(known, expected[-len(known) :], rtol=0, atol=TOLERANCE)


def test_results_depend_on_no_batch_no_chunk_and_no_order(
    make_engine, requests, reference_model, monkeypatch, largest_difference
):
    expected = make_engine(reference_model, batch_tokens=8192).score(requests)
    for batch_tokens in (17, 300):
        assert (
            largest_difference(make_engine(reference_model, batch_tokens=batch_tokens).score(requests), expected) < 1e-5
        )
    assert largest_difference(make_engine(reference_model).score(requests[::-1])[::-1], expected) < 1e-5
    monkeypatch.setattr("weighted_mtp.scoring.engines.logits.MIN_ROWS", 1)
    monkeypatch.setattr("weighted_mtp.scoring.engines.logits.CACHED_LOGITS_BYTES", 4 * 260 * 7)
    assert largest_difference(make_engine(reference_model, batch_tokens=8192).score(requests), expected) < 1e-5


def test_only_scored_rows_reach_the_head(make_engine, reference_model, monkeypatch):
    ids = np.arange(200, dtype=np.int32)
    loaded = make_engine(reference_model, batch_tokens=8192)
    rows = []
    from weighted_mtp.scoring.engines.vllm_scorer import TokenScorer

    original = TokenScorer.score

    def count(self: object, hidden_states: object, wanted: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(wanted))
        return original(self, hidden_states, wanted, *rest)

    monkeypatch.setattr(TokenScorer, "score", count)
    loaded.score([Request(ids, 150)])
    assert sum(rows) == 50


def test_bfloat16_stays_near_float32(make_engine, requests, tmp_path):
    """Logits are float32 in any case: what is lost is lost in the layers."""
    model = make_checkpoint("qwen2-tied", tmp_path)
    expected = make_engine(model, "transformers").score(requests)
    scores = make_engine(model, dtype="bfloat16").score(requests)
    differences = np.concatenate([(a - b).ravel() for a, b in zip(scores, expected, strict=True)])
    assert 0 < np.sqrt(np.nanmean(differences**2)) < 0.05


def test_quantised_checkpoint(make_engine, requests, reference_model, tmp_path, largest_difference, monkeypatch):
    """Weights and activations in 8 bits, as compressed-tensors stores them, against vLLM's public API."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # vLLM's kernels for AMX take no float32
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
    expected = make_engine(tmp_path, method="prompt_logprobs").score(losses)
    scores = make_engine(tmp_path).score(losses)
    assert largest_difference(scores, expected) < TOLERANCE
    assert largest_difference(scores, make_engine(reference_model).score(losses)) > 0.1, "nothing was quantised"


def test_positions_of_models_with_two_embeddings_of_them(make_engine, requests, tmp_path, largest_difference):
    """LongRoPE: the longest sequence has the length up to which the short factors hold."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "rope_type": "longrope", "rope_theta": 10000.0}
    sizes = LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = transformers.Phi3Config(**sizes, rope_parameters=factors | {"original_max_position_embeddings": 256})
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    expected = make_engine(tmp_path, "transformers").score(requests)
    assert largest_difference(make_engine(tmp_path).score(requests), expected) < TOLERANCE
