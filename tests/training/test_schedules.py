"""Learning rates and warm-up factors, worked out by hand."""

from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from weighted_mtp.schemas.configs import OptimizerConfig
from weighted_mtp.schemas.errors import SettingsError
from weighted_mtp.training.schedules import linear_warmup, make_learning_rate_schedule


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.1, 0.1]),
        ({"schedule": "cosine"}, [0, 0.5, 1, 0.5 + 3**0.5 / 4, 0.75, 0.5, 0.25, 0.5 - 3**0.5 / 4, 0.1, 0.1]),
        (
            {"schedule": "linear", "min_learning_rate_ratio": 0.4},
            [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4],
        ),
        (
            {"schedule": "cosine", "min_learning_rate_ratio": 0.2},
            [0, 0.5, 1, 0.6 + 0.4 * 3**0.5 / 2, 0.8, 0.6, 0.4, 0.6 - 0.4 * 3**0.5 / 2, 0.2, 0.2],
        ),
        ({"schedule": "wsd", "decay_ratio": 0.5}, [0, 0.5, 1, 1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.1, 0.1]),
        (
            {"schedule": "wsd", "decay_ratio": 0.5, "min_learning_rate_ratio": 0.2},
            [0, 0.5, 1, 1, 1, 0.6, 1 - 0.8 * 0.5**0.5, 1 - 0.8 * 0.75**0.5, 0.2, 0.2],
        ),
        ({"schedule": "wsd"}, [0, 0.5, 1, 1, 1, 1, 1, 1 - 0.5**0.5, 0.1, 0.1]),  # 0.2 of the steps, rounded
        ({"schedule": "wsd", "decay_ratio": 0.75}, [0, 0.5] + [1 - (n / 6) ** 0.5 for n in range(6)] + [0.1, 0.1]),
    ],
)
def test_learning_rates_of_eight_steps_with_two_of_warm_up(settings: dict[str, Any], expected: list[float]) -> None:
    """And of two more after the schedule."""
    assert rates_of(settings | {"warmup_ratio": 0.25}, steps=8, taken=10) == pytest.approx(expected)


def rates_of(settings: dict[str, Any], steps: int, taken: int) -> list[float]:
    """Learning rate of each step, as a share of the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make_learning_rate_schedule(optimizer, OptimizerConfig.model_validate(settings), steps)
    rates = []
    for _ in range(taken):
        rates.append(scheduler.get_last_lr()[0] / 2.0)
        optimizer.step()
        scheduler.step()
    return rates


def test_minimum_of_a_cosine_equals_that_of_transformers() -> None:
    settings = {"schedule": "cosine", "warmup_ratio": 0.2, "min_learning_rate_ratio": 0.1}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 50, min_lr_rate=0.1)
    assert rates_of(settings, 50, 50) == pytest.approx([theirs.lr_lambdas[0](step) for step in range(50)])


def test_warm_up_and_decay_that_round_to_more_than_all_steps_do_not_overlap() -> None:
    settings = {"schedule": "wsd", "warmup_ratio": 0.3, "decay_ratio": 0.7}  # of 5 steps: 2 and 4, rounded
    expected = [0, 0.5, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]
    assert rates_of(settings, 5, 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_ratio": 0.2}, "decay_ratio needs --optimizer.schedule wsd"),
        ({"schedule": "constant", "min_learning_rate_ratio": 0.1}, "needs a schedule that decays"),
        ({"schedule": "wsd", "warmup_ratio": 0.85}, "should sum to at most 1"),
        ({"schedule": "wsd", "decay_ratio": 0}, "greater than 0"),
        ({"min_learning_rate_ratio": 1}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        OptimizerConfig(**settings)


def test_linear_warmup_rises_over_its_share_of_the_steps() -> None:
    assert [linear_warmup(step, 0.5, 8) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert linear_warmup(0, 0.0, 8) == 1
