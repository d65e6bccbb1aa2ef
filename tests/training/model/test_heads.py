"""How heads start."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.mtp_model import build_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_decoder_heads_from_scratch_keep_the_parameter_count(architecture: str, model_dir: Callable[..., Path]) -> None:
    path = str(model_dir(architecture))
    plain = build_model(path, HeadsConfig(offsets=(1,)), from_scratch=True)
    heads = build_model(path, HeadsConfig(block="decoder", offsets=(1, 2, 3)), from_scratch=True)
    assert sum(p.numel() for p in heads.parameters()) == sum(p.numel() for p in plain.parameters())
    assert heads.trunk.config.num_hidden_layers == 1
    with pytest.raises(UserError, match="too few"):
        build_model(path, HeadsConfig(block="decoder", offsets=(1, 2, 3, 4)), from_scratch=True)


def test_residual_heads_start_as_the_trunks_own_prediction(model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model.heads[0](hidden), hidden, rtol=0, atol=0)
