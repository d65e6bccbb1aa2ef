"""Loading trunks, choosing their attention, and refusing unsupported ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ElectraConfig,
    FalconConfig,
    Gemma3Config,
    GraniteConfig,
    Llama4TextConfig,
    ModernBertDecoderConfig,
    Phi3Config,
)

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.mtp_model import build_model, load_model
from weighted_mtp.training.model.trainable_parameters import freeze_unused
from weighted_mtp.training.model.trunk import choose_attention

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SHAPE | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "rope_theta": 10.0}
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)


def test_attention_follows_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu) is None
    assert choose_attention("sdpa", cpu) == "sdpa"
    assert choose_attention("flex_attention", gpu) == "flex_attention"
    with pytest.raises(UserError, match="--attention flex_attention: trains on a GPU only; use sdpa"):
        choose_attention("flex_attention", cpu)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=2.0),
            "the logits of GraniteForCausalLM are not its final hidden states times the unembedding; use",
        ),
        (
            ModernBertDecoderConfig(**SHAPE | SPECIAL),
            "the logits of ModernBertDecoderForCausalLM are not its final hidden states times the unembedding; use",
        ),
        (
            ElectraConfig(**SHAPE, embedding_size=16, is_decoder=True),
            r"ElectraForCausalLM does not run on packed rows \(RuntimeError: .*\); use",
        ),
        (FalconConfig(**{n: v for n, v in SHAPE.items() if n != "intermediate_size"}), "does not separate packed"),
    ],
)
def test_unsupported_architectures_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        build_model(str(tmp_path), HeadsConfig(), from_scratch=True)


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**TEXT | {"vocab_size": 60}, original_max_position_embeddings=12, rope_parameters=LONGROPE),
        Llama4TextConfig(**TEXT, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=2),
        Gemma3Config(text_config=TEXT, vision_config=VISION | {"patch_size": 4}, mm_tokens_per_image=4),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("heads", [HeadsConfig(offsets=(1,)), HeadsConfig(offsets=(1, 2), kind="sequential")])
def test_losses_are_those_of_the_whole_model(config: Any, heads: HeadsConfig, tmp_path: Path) -> None:
    """Llama 4 and Gemma 3 have layers and settings elsewhere; Phi 3 has other positions in long documents."""
    torch.manual_seed(0)
    config.get_text_config().initializer_range = 0.3
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    model = load_model(str(tmp_path / "whole"), heads).eval()
    documents = [torch.arange(length)[None] for length in (12, 20, 5)]
    ids, positions = torch.cat(documents, 1) + 3, torch.cat(documents, 1)
    _, sums = model(ids, positions, torch.ones(ids.shape), by_document=True)
    alone = [whole(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in ids.split((12, 20, 5), dim=1)]
    torch.testing.assert_close(sums.plain_loss[0].float(), torch.stack(alone).detach(), rtol=1e-4, atol=1e-4)
    freeze_unused(model.trunk)
    loss, _ = model(ids, positions, torch.ones(ids.shape))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "experts" not in n)
    model.save(tmp_path / "saved")
    saved = load_model(str(tmp_path / "saved")).trunk.parameters()
    assert all(torch.equal(*pair) for pair in zip(saved, whole.parameters(), strict=True))


def test_missing_weights_name_the_remedy(tmp_path: Path, model_dir: Callable[..., Path]) -> None:
    path = model_dir()
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--from_scratch"):
        build_model(str(path), HeadsConfig(), from_scratch=False)
