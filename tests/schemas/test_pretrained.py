"""Models are complete, and their attention kernels compute all of them."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import drops_part, load_causal_lm, load_tokenizer, native_heads
from weighted_mtp.training.model.mtp_model import build_model

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
WINDOW = {"sliding_window": 8}


def make(architecture: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | settings)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("gemma2", {}, True),
        ("gemma2", {"attn_logit_softcapping": 5.0, **WINDOW}, True),
        ("vaultgemma", {}, True),
        ("gemma2", {"attn_logit_softcapping": None, **WINDOW}, False),
        ("gemma3_text", WINDOW, False),
        ("llama", {}, False),
        ("mistral", WINDOW, False),
        ("qwen3", {}, False),
        ("mixtral", {}, False),
        ("gpt_neox", {}, False),
        ("bloom", {}, False),
    ],
)
def test_a_soft_cap_that_sdpa_leaves_out_is_found(
    architecture: str, settings: dict[str, Any], expected: bool, dtype: torch.dtype
) -> None:
    model = make(architecture, **settings).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert drops_part(model) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    make("gemma2", attn_logit_softcapping=5.0, initializer_range=0.3).save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def test_the_default_attention_gives_the_logits_of_eager_attention(gemma: Path) -> None:
    ids = torch.arange(40)[None] * 5
    eager = AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager").eval()
    sdpa = AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="sdpa").eval()
    loaded = load_causal_lm("--reference gemma", gemma, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = eager(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
        assert (sdpa(ids).logits - expected).abs().max() > 0.1, "the cap has to matter"


@pytest.mark.parametrize("from_scratch", [True, False])
def test_sdpa_is_refused_for_a_model_that_it_changes(gemma: Path, from_scratch: bool) -> None:
    with pytest.raises(UserError, match="that sdpa attention leaves out; use eager attention"):
        build_model(str(gemma), None, from_scratch=from_scratch, attention="sdpa")
    model = build_model(str(gemma), None, from_scratch=from_scratch)
    assert model.trunk.config._attn_implementation == "eager"


def test_layers_with_several_masks_are_eager(tmp_path: Path) -> None:
    settings = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 2, "pad_token_id": 0}
    make("zaya", **settings, router_hidden_size=16).save_pretrained(tmp_path)
    assert load_causal_lm("--base zaya", tmp_path, dtype=torch.float32).config._attn_implementation == "eager"


Weights = dict[str, torch.Tensor]


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("lm_head"), {}, "lacks lm_head.weight"),
        (without("layers.1.mlp"), {}, "lacks model.layers.1.mlp.down_proj.weight"),
        (dict, {"num_hidden_layers": 3}, "lacks model.layers.2."),
        (
            dict,
            {"intermediate_size": 96},
            r"down_proj.weight has shape \(64, 128\) in the checkpoint and \(64, 96\) by",
        ),
        (dict, {"vocab_size": 300}, r"lm_head.weight has shape \(260, 64\) in the checkpoint and \(300, 64\) by"),
    ],
)
def test_weights_that_a_checkpoint_lacks_are_not_made_up(
    change: Callable[[Weights], Weights], config: dict[str, int], message: str, tmp_path: Path
) -> None:
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | config))
    with pytest.raises(UserError, match=message):
        load_causal_lm("--model it", tmp_path, dtype=torch.float32)
    with pytest.raises(UserError, match=message):
        build_model(str(tmp_path), None, from_scratch=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("model.layers.1.self_attn.q_proj.bias", "lm_head.bias"), "has lm_head.bias and 1 other weights, which Llama"),
        (("model.layers.0.mlp.up_proj.lora_A.default.weight",), "has model.layers.0.mlp.up_proj.lora_A.default.weight"),
        (("model.layers.0.mlp.up_proj.weight_scale",), "has model.layers.0.mlp.up_proj.weight_scale, which LlamaForC"),
        (("model.layers.1.self_attn.q_norm.weight",), "has model.layers.1.self_attn.q_norm.weight, which LlamaForCau"),
        (("model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.masked_bias"), None),
        (("model.layers.1.self_attn.bias", "value_head.weight", "mtp.layers.0.mlp.up_proj.weight"), None),
        (("vision_tower.layers.0.mlp.up_proj.bias", "vision_tower.layers.7.mlp.up_proj.weight"), None),
    ],
)
def test_weights_that_the_layers_do_not_use_are_refused(
    extra: tuple[str, ...], message: str | None, tmp_path: Path
) -> None:
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2) for name in extra}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) if message else nullcontext():
        load_causal_lm("--base it", tmp_path, dtype=torch.float32)


def test_layers_that_the_config_does_not_know_are_refused(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"has model.layers.1.\S+, but its config.json says that it has 1 layers"):
        load_causal_lm("--base it", tmp_path, dtype=torch.float32)


def test_native_heads_are_counted_and_accepted(tmp_path: Path) -> None:
    """A GLM-4-MoE keeps its multi-token-prediction layer as layer number `num_hidden_layers`."""
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    make("glm4_moe", num_nextn_predict_layers=1, **experts).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    native = {name.replace("layers.1", "layers.2"): value.clone() for name, value in weights.items() if ".1." in name}
    save_file(weights | native, file, metadata={"format": "pt"})
    model = load_causal_lm("--base it", tmp_path, dtype=torch.float32)
    assert native_heads(model.config) == 1
    assert native_heads(make("llama").config) == 0


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_tokenizer_that_cannot_be_loaded(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer .*cannot be loaded") as error:
        load_tokenizer(tmp_path, f"--tokenizer {tmp_path}: cannot be loaded", "give another one")
    assert "\n" not in str(error.value)


def test_code_of_another_model_does_not_run(make_own_code: Callable[..., Path]) -> None:
    """transformers gives both the model class that it registered first for their config class."""
    first, second = make_own_code(seed=1), make_own_code(seed=2)
    for path in (first, second):  # a config class that no other test uses
        (path / "configuration_own.py").write_text((path / "configuration_own.py").read_text() + "    of_two = True\n")
    load_causal_lm("--base first", first, dtype=torch.float32, trust_remote_code=True)
    load_causal_lm("--base second", second, dtype=torch.float32, trust_remote_code=True)
    (second / "modeling_own.py").write_text((second / "modeling_own.py").read_text() + "    twice = True\n")
    with pytest.raises(UserError, match="--base second: another model of this process has the same config class"):
        load_causal_lm("--base second", second, dtype=torch.float32, trust_remote_code=True)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("bert", {"is_decoder": False}), ("gemma3_text", {"use_bidirectional_attention": True, **WINDOW})],
)
def test_models_that_see_later_tokens_are_refused(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    make(architecture, **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^--base it: the prediction of a token depends on later tokens; give"):
        load_causal_lm("--base it", tmp_path, dtype=torch.float32)


def test_weights_that_are_not_finite_are_left_to_the_losses(tmp_path: Path) -> None:
    model = make("llama")
    model.lm_head.weight.data[3] = torch.nan
    model.model.layers[0].self_attn.q_proj.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    load_causal_lm("--base it", tmp_path, dtype=torch.float32)
