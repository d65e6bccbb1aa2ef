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
    found = evaluate(settings)
    near, far = found.losses
    assert evaluate(settings, make_bar) == found
    assert capfd.readouterr() == ("", "")
    assert bars == ["evaluate"]
    with pytest.raises(UserError, match="--dtype: this process already computes in another dtype; use that one, or a"):
        evaluate(settings.model_copy(update={"dtype": "bfloat16"}))
    last = logged(run)[-1]
    assert (near.prediction, far.prediction) == ("1", "2")
    for head in (near, far):
        for name in ("loss", "accuracy", "targets", "documents", "standard_error"):
            assert getattr(head, name) == pytest.approx(last[f"eval_{name}_{head.prediction}"]), name
    assert last["eval_sequence_length"] == found.sequence_length == 64


def test_a_run_evaluates_the_same_tokens_for_any_micro_batch(config: Callable[..., TrainConfig]) -> None:
    """150 tokens: documents of 40, 90 and 7 tokens, and 13 of the next; pieces of at most 64 tokens are five."""
    runs = [config(f"run-{size}", max_steps=1, eval_tokens=150, micro_batch_size=size) for size in (1, 4)]
    one, four = map(train, runs)
    assert one["eval_targets_1"] == four["eval_targets_1"] == 150 - 5
    assert one["eval_documents_1"] == four["eval_documents_1"] == 4
    assert one["eval_loss_1"] == pytest.approx(four["eval_loss_1"], rel=1e-5)
    settings = EvaluateConfig(model=str(runs[0].output), input=runs[0].eval_input[0], max_tokens=150)
    assert evaluate(settings).losses[0].targets == 145


def test_where_the_sequence_length_comes_from(config: Callable[..., TrainConfig]) -> None:
    run = config("run", max_steps=1)
    train(run)
    held_out = run.eval_input[0]
    of_run = evaluate(EvaluateConfig(model=str(run.output), input=held_out))
    assert (of_run.sequence_length, of_run.length_source) == (64, "run")
    given = evaluate(EvaluateConfig(model=str(run.output), input=held_out, sequence_length=32))
    assert (given.sequence_length, given.length_source) == (32, "setting")
    of_set = evaluate(EvaluateConfig(model=run.model, input=held_out))
    assert (of_set.sequence_length, of_set.length_source) == (120, "set")
    record = run.output / "run.json"
    record.write_text(record.read_text().replace('"sequence_length": 64', '"sequence_length": 2'))
    with pytest.raises(UserError, match=r"--model .*: has a head 2 tokens ahead, .* give --sequence_length 3 or"):
        evaluate(EvaluateConfig(model=str(run.output), input=held_out))
