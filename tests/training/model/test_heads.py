"""How heads start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    DiffLlamaConfig,
    Exaone4Config,
    ExaoneMoeConfig,
    FuyuConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    PersimmonConfig,
    Qwen2Config,
    SmolLM3Config,
)

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.mtp_model import build_model, load_model

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "pad_token_id": 0}
SHAPE |= {"initializer_range": 0.5}
LLAMA = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
LAYERS_DIFFER = {
    "no positions in one of four layers": SmolLM3Config(**LLAMA),
    "scores divided by the number of the layer": GPT2Config(**SHAPE, scale_attn_by_inverse_layer_idx=True),
    "a constant of each layer": DiffLlamaConfig(**LLAMA),
    "windows, and no positions outside them": Exaone4Config(**LLAMA, sliding_window=4, sliding_window_pattern=4),
    "windows in every other layer": Gemma2Config(**LLAMA, head_dim=16, sliding_window=4),
    "windows in the last layers": Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "windows by a formula": GPTNeoConfig(**SHAPE, attention_types=[[["global", "local"], 2]], window_size=4),
    "experts in all layers but the first": ExaoneMoeConfig(
        **LLAMA, sliding_window=4, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1,
    ),
    "a config inside": FuyuConfig(**SHAPE, text_config=PersimmonConfig(**SHAPE, intermediate_size=48)),
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"block": "decoder"}, {"kind": "sequential"}], ids=str)
@pytest.mark.parametrize("family", LAYERS_DIFFER)
def test_a_new_model_whose_layers_differ_is_loaded_as_it_was_saved(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = LAYERS_DIFFER[family]
    config.save_pretrained(tmp_path / "config")
    heads = HeadsConfig(**settings, offsets=(1, 2, 3))
    model = build_model(str(tmp_path / "config"), heads, from_scratch=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").eval()
    ids = torch.randint(0, 50, (1, 12), generator=generator)
    batch = ids, torch.arange(12)[None], torch.ones(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*batch)[1].plain_loss, model(*batch)[1].plain_loss)
    assert loaded.trunk.config.get_text_config().num_hidden_layers == (2 if "block" in settings else 4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_decoder_heads_from_scratch_keep_the_parameter_count(architecture: str, model_dir: Callable[..., Path]) -> None:
    path = str(model_dir(architecture))
    plain = build_model(path, HeadsConfig(offsets=(1,)), from_scratch=True)
    heads = build_model(path, HeadsConfig(block="decoder", offsets=(1, 2, 3)), from_scratch=True)
    assert sum(p.numel() for p in heads.parameters()) == sum(p.numel() for p in plain.parameters())
    assert heads.trunk.config.num_hidden_layers == 1
    with pytest.raises(UserError, match="too few"):
        build_model(path, HeadsConfig(block="decoder", offsets=(1, 2, 3, 4)), from_scratch=True)


@pytest.mark.parametrize("settings", [{"block": "decoder"}, {"kind": "sequential"}], ids=str)
def test_layers_that_do_not_run_as_heads_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Hidden states of this architecture have several streams."""
    sizes = {"head_dim": 16, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
    AutoConfig.for_model("hy_v4", **LLAMA | sizes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the layers of HYV4ForCausalLM do not run as heads \(RuntimeError: .*\); use"):
        build_model(str(tmp_path), HeadsConfig(**settings, offsets=(1, 2)), from_scratch=True)


def test_layers_that_cannot_be_left_out_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma4_unified_text", **LLAMA).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Config does not allow 2 layers besides 2 decoder heads \(.*\); use --heads"):
        build_model(str(tmp_path), HeadsConfig(block="decoder", offsets=(1, 2, 3)), from_scratch=True)


def test_residual_heads_start_as_the_trunks_own_prediction(model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model.heads[0](hidden), hidden, rtol=0, atol=0)
