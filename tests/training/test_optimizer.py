"""The parameters of AdamW, one step of it by hand, and steps with 8-bit moments."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from weighted_mtp.schemas.configs import OptimizerConfig
from weighted_mtp.training.optimizer import make_optimizer, moment_tensors

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


@pytest.fixture
def eight_bit() -> OptimizerConfig:
    pytest.importorskip("torchao")
    return CONFIG.model_copy(update={"kind": "adamw8bit"})


@pytest.fixture
def _eager() -> Iterator[None]:
    """torchao compiles its step for each shape, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def steps_apart(eight_bit: OptimizerConfig, steps: int) -> float:
    """Largest difference after some steps with 8-bit and float32 moments, as a share of the largest change."""
    start = nn.Linear(96, 64)
    results = []
    for config in (CONFIG, eight_bit):
        model = nn.Linear(96, 64)
        model.load_state_dict(start.state_dict())
        optimizer = make_optimizer(model, config)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    before = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    exact, quantised = results
    return float((quantised - exact).abs().max() / (exact - before).abs().max())


@pytest.mark.usefixtures("_eager")
def test_eight_bit_moments_change_no_first_step_and_later_ones_little(eight_bit: OptimizerConfig) -> None:
    """The first step uses moments before they are rounded."""
    assert steps_apart(eight_bit, 1) < 1e-5
    assert 1e-4 < steps_apart(eight_bit, 5) < 0.2


@pytest.mark.slow
def test_a_compiled_step_with_eight_bit_moments(eight_bit: OptimizerConfig) -> None:
    assert steps_apart(eight_bit, 1) < 1e-5


@pytest.mark.usefixtures("_eager")
def test_blocks_of_eight_bit_moments_do_not_cross_rows(eight_bit: OptimizerConfig) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(90, 64))
    optimizer = make_optimizer(model, eight_bit)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    moments = {name: moment_tensors(optimizer.state[p]["exp_avg"]) for name, p in model.named_parameters()}
    quantised = moments.pop("0.weight")
    assert (quantised[".codes"].shape, quantised[".codes"].dtype) == ((64, 96), torch.uint8)
    assert quantised[".scales"].shape == (64, 3)  # blocks of 32
    gradient = model[0].weight.grad.view(64, 3, 32)
    torch.testing.assert_close(quantised[".scales"], 0.2 * gradient.amax(-1))
    assert all(moment[""].dtype == torch.float32 for moment in moments.values())
