"""The parameters of AdamW, and one step of it by hand."""

import pytest
import torch
from torch import nn

from weighted_mtp.schemas.configs import OptimizerConfig
from weighted_mtp.training.optimizer import make_optimizer

CONFIG = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9))


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    matrices, vectors = make_optimizer(model, CONFIG).param_groups
    assert [id(value) for value in matrices["params"]] == [id(model[0].weight)]
    assert [id(value) for value in vectors["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0)
    assert all((group["lr"], tuple(group["betas"])) == (0.1, (0.8, 0.9)) for group in (matrices, vectors))


def test_first_step_by_hand() -> None:
    """Bias correction makes the first step the sign of the gradient; decay is learning rate times decay."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    model.weight.grad, model.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), -3.0)
    make_optimizer(model, CONFIG).step()
    assert model.weight.item() == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1)
    assert model.bias.item() == pytest.approx(2 + 0.1)
