"""Floating point operations of a step, counted by hand for tiny models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weighted_mtp.schemas.configs import HeadsConfig, LoRAConfig
from weighted_mtp.training.model.flops import StepFlops
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.model.trainable_parameters import add_adapters, freeze_trunk

# Llama of width 32: q, k, v, o are 32 x 32, gate, up, down 32 x 48, in each of 3 layers.
LLAMA = 3 * (4 * 32 * 32 + 3 * 32 * 48)
# GPT-2 of width 32: attention 32 x 96 and 32 x 32, feed-forward 32 x 128 twice.
GPT2 = 3 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
PAIR = 3 * 2 * 2 * 32  # scores and values, in 3 layers, two operations for a multiplication


def selected(*counts: int) -> torch.Tensor:
    """Number of selected targets of each prediction."""
    return torch.tensor(counts, dtype=torch.float32)


@pytest.mark.parametrize(("architecture", "matrices"), [("llama", LLAMA), ("llama-tied", LLAMA), ("gpt2", GPT2)])
def test_next_token_prediction(architecture: str, matrices: int, model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir(architecture)), HeadsConfig(offsets=(1,)), from_scratch=False)
    expected = 6 * matrices * 100 + 3 * PAIR * 5000 + 6 * 258 * 32 * 60
    assert StepFlops(model)(100, 5000, selected(60)) == expected


def test_residual_heads_cost_their_rows_and_decoder_heads_all(model_dir: Callable[..., Path]) -> None:
    path = str(model_dir())
    trunk = 6 * LLAMA * 100 + 3 * PAIR * 5000
    rows = 6 * 258 * 32 * (60 + 40)
    residual = build_model(path, HeadsConfig(offsets=(1, 2)), from_scratch=False)
    assert StepFlops(residual)(100, 5000, selected(60, 40)) == trunk + rows + 6 * 32 * 32 * 40
    decoder = build_model(path, HeadsConfig(offsets=(1, 2), block="decoder"), from_scratch=False)
    assert StepFlops(decoder)(100, 5000, selected(60, 40)) == trunk * 4 / 3 + rows


def test_token_order_costs_its_rows(model_dir: Callable[..., Path]) -> None:
    config = HeadsConfig(offsets=(1, 2), top_coefficient=1.0)
    model = build_model(str(model_dir()), config, from_scratch=False)
    trunk = 6 * LLAMA * 100 + 3 * PAIR * 5000
    heads = 6 * 258 * 32 * (60 + 40) + 6 * 32 * 32 * 40
    assert StepFlops(model)(100, 5000, selected(60, 40, 50)) == trunk + heads + 6 * 258 * 32 * 50
    freeze_trunk(model.trunk)
    frozen = 2 * LLAMA * 100 + PAIR * 5000 + 4 * 258 * 32 * 100 + 6 * 32 * 32 * 40
    assert StepFlops(model)(100, 5000, selected(60, 40, 50)) == frozen + 4 * 258 * 32 * 50


def test_what_is_frozen_needs_no_gradient(model_dir: Callable[..., Path]) -> None:
    frozen = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    freeze_trunk(frozen.trunk)
    expected = 2 * LLAMA * 100 + PAIR * 5000 + 4 * 258 * 32 * 100 + 6 * 32 * 32 * 40
    assert StepFlops(frozen)(100, 5000, selected(60, 40)) == expected
    adapted = build_model(str(model_dir()), HeadsConfig(offsets=(1,)), from_scratch=False)
    add_adapters(adapted.trunk, LoRAConfig(rank=1))
    adapters = 3 * (4 * 64 + 3 * 80)
    expected = 4 * (LLAMA + adapters) * 100 + 3 * PAIR * 5000 + 4 * 258 * 32 * 60
    assert StepFlops(adapted)(100, 5000, selected(60)) == expected
