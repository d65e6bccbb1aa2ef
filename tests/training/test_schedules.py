"""Learning rates and warm-up factors, worked out by hand."""

import pytest
import torch

from weighted_mtp.schemas.configs import OptimizerConfig
from weighted_mtp.training.schedules import linear_warmup, make_learning_rate_schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.1, 0.1]),
        ("cosine", [0, 0.5, 1, 0.5 + 3**0.5 / 4, 0.75, 0.5, 0.25, 0.5 - 3**0.5 / 4, 0.1, 0.1]),
    ],
)
def test_learning_rates_of_eight_steps_with_two_of_warm_up(schedule: str, expected: list[float]) -> None:
    """And of two more after the schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    config = OptimizerConfig.model_validate({"schedule": schedule, "warmup_ratio": 0.25})
    scheduler = make_learning_rate_schedule(optimizer, config, steps=8)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0] / 2.0)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_linear_warmup_rises_over_its_share_of_the_steps() -> None:
    assert [linear_warmup(step, 0.5, 8) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert linear_warmup(0, 0.0, 8) == 1
