"""Loading trunks, choosing their attention, and refusing unsupported ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import FalconConfig, GraniteConfig

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.model.trunk import choose_attention


def test_attention_follows_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu) is None
    assert choose_attention("sdpa", cpu) == "sdpa"
    assert choose_attention("flex_attention", gpu) == "flex_attention"
    with pytest.raises(UserError, match="--attention flex_attention: trains on a GPU only; use sdpa"):
        choose_attention("flex_attention", cpu)


def test_unsupported_architectures_are_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GraniteConfig(**shape, num_key_value_heads=2, logits_scaling=2.0).save_pretrained(tmp_path / "granite")
    with pytest.raises(UserError, match="rescales its logits"):
        build_model(str(tmp_path / "granite"), HeadsConfig(), from_scratch=True)
    FalconConfig(**shape).save_pretrained(tmp_path / "falcon")
    with pytest.raises(UserError, match="does not separate packed documents"):
        build_model(str(tmp_path / "falcon"), HeadsConfig(), from_scratch=True)


def test_missing_weights_name_the_remedy(tmp_path: Path, model_dir: Callable[..., Path]) -> None:
    path = model_dir()
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--from_scratch"):
        build_model(str(path), HeadsConfig(), from_scratch=False)
