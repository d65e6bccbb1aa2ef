"""Evaluation of a run, from its settings."""

from collections.abc import Callable
from typing import Any

import pytest
from comparing import logged
from tqdm import tqdm

from weighted_mtp.schemas.configs import EvaluateConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import hidden_bar
from weighted_mtp.training.run.evaluate import evaluate
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration


def test_the_losses_are_those_of_the_run_and_nothing_is_shown(
    config: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    run = config("run", max_steps=2)
    train(run)
    bars: list[str] = []

    def make_bar(**settings: Any) -> tqdm:
        bars.append(settings["desc"])
        return hidden_bar(**settings)

    capfd.readouterr()
    settings = EvaluateConfig(model=str(run.output), input=run.eval_input[0])
    near, far = evaluate(settings)
    assert evaluate(settings, make_bar) == [near, far]
    assert capfd.readouterr() == ("", "")
    assert bars == ["evaluate"]
    with pytest.raises(UserError, match="--dtype: this process already computes in another dtype; use that one, or a"):
        evaluate(settings.model_copy(update={"dtype": "bfloat16"}))
    last = logged(run)[-1]
    assert (near.prediction, far.prediction) == ("1", "2")
    assert near.loss == pytest.approx(last["eval_loss_1"])
    assert far.loss == pytest.approx(last["eval_loss_2"])
