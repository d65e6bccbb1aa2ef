"""Optimizer steps: gradient accumulation, steps without signal and bad steps."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import LENGTHS, metrics, trained
from safetensors.torch import load_file
from torch import Tensor

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.run.train import train
from weighted_mtp.training.trainer import TrainingLoop

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("normalization", ["tokens", "weight_sum"])
def test_micro_batches_do_not_change_the_result(normalization: str, config: Callable[..., TrainConfig]) -> None:
    runs = [config(f"micro-{size}", micro_batch_size=size, normalization=normalization) for size in (4, 1, 3)]
    results = [(train(run), trained(run)) for run in runs]
    for summary, parameters in results[1:]:
        assert summary["eval_loss_1"] == pytest.approx(results[0][0]["eval_loss_1"], rel=1e-5)
        for name, value in parameters.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_equal_one_even_when_stopped_inside_a_metrics_window(
    config: Callable[..., TrainConfig], launch: Callable[..., None]
) -> None:
    """Two gloo processes with half the rows each, stopped and continued, log the same losses as one process."""
    one, two = config("one", max_steps=8, log_every=4), config("two", max_steps=8, log_every=4, checkpoint_every=3)
    train(one)
    for stop in (6, None):
        launch(two, 2, stop_at=stop)
        assert (two.output / "summary.json").exists() == (stop is None)
        assert (two.output / "checkpoints").exists() == (stop is not None)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(two)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_continue_a_finished_run_like_one(
    config: Callable[..., TrainConfig], launch: Callable[..., None]
) -> None:
    one, two = (config(name, max_steps=4, log_every=2, keep_checkpoints=True) for name in ("one", "two"))
    train(one)
    launch(two, 2)
    one, two = (run.model_copy(update={"continue_steps": 4, "keep_checkpoints": False}) for run in (one, two))
    train(one)
    launch(two, 2)
    launch(two, 2)
    assert [line["step"] for line in metrics(two) if "loss" in line] == [2, 4, 6, 8]
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(two)[name], value, rtol=1e-3, atol=1e-4)
    assert not list(two.output.glob("*checkpoints"))


def test_a_bad_step_is_skipped_and_counted(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch of step 4 has an infinite loss: that step must leave no trace but a count."""
    run = config("run", log_every=1, checkpoint_every=1, max_checkpoints=6, keep_checkpoints=True)
    forward, calls = MTPModel.forward, []

    def spoiled(self: MTPModel, *args: Any, **kwargs: Any) -> tuple[Tensor, HeadSums]:
        loss, sums = forward(self, *args, **kwargs)
        calls.append(self.training)
        return (loss * math.inf, not_a_number(sums)) if sum(calls) == 7 else (loss, sums)

    monkeypatch.setattr(MTPModel, "forward", spoiled)
    summary = train(run)
    assert summary["bad_steps"] == 1
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["bad_steps"] for line in lines] == [0, 0, 0] + [1] * 3
    assert [line["loss"] is None for line in lines] == [False] * 3 + [True] + [False] * 2
    assert all(line["selected_share"] == 1 for line in lines if line["loss"])
    parameters = [
        torch.cat([value.flatten() for _, value in sorted(load_checkpoint(run, step).items())]) for step in (3, 4, 5)
    ]
    assert torch.equal(parameters[0], parameters[1])
    assert not torch.equal(parameters[1], parameters[2])


def not_a_number(sums: HeadSums) -> HeadSums:
    """NaN in place of all sums."""
    return HeadSums(*(values * math.nan for values in sums))


def load_checkpoint(config: TrainConfig, step: int) -> dict[str, Tensor]:
    """Parameters in a checkpoint of one process."""
    [file] = (config.output / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {name: value for name, value in load_file(file).items() if name.startswith("model.")}


@pytest.mark.parametrize("allowed", [0, 2])
def test_too_many_bad_steps_name_the_shard(
    allowed: int, config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss is infinite for rows that hold sequences of the second shard, from step 3 on."""
    run = config("run", max_bad_steps=allowed, log_every=1, max_steps=12, checkpoint_every=2, micro_batch_size=1)
    steps = []

    def spoil(self: TrainingLoop, micro_batch: Rows, *args: Any, last: bool) -> HeadSums:
        sums = forward_backward(self, micro_batch, *args, last=last)
        steps.append(self.step)
        return not_a_number(sums) if self.step >= 2 and 1 in micro_batch.sources[0] else sums

    forward_backward = TrainingLoop._forward_backward
    monkeypatch.setattr(TrainingLoop, "_forward_backward", spoil)
    with pytest.raises(UserError, match=rf"for {allowed + 1} steps in a row.*shard-00001-of-00002.parquet"):
        train(run)
    assert max(steps) >= 2 + allowed
    monkeypatch.undo()
    assert train(run)["steps"] == 12  # goes on from the last good checkpoint


def test_steps_without_signal_change_nothing_and_are_counted(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """Only tokens of 4 of 36 sequences have a positive score, so most steps have nothing to learn from."""
    shards = scored_set(LENGTHS, name="silent", silent_after=4)
    run = config(
        "run", input=shards.path, weights={"preset": "soft-threshold"}, log_every=1, batch_size=2, checkpoint_every=1,
        max_checkpoints=12, keep_checkpoints=True, max_steps=12, optimizer={"learning_rate": 1e-2, "warmup_ratio": 0.0},
    )  # fmt: skip
    summary = train(run)
    lines = [line for line in metrics(run) if "loss" in line]
    counts = [line["no_signal_steps"] for line in lines]
    assert 3 <= counts[-1] == summary["no_signal_steps"] < 12
    assert summary["no_signal_documents"] > 10
    silent = next(step for step in range(2, 12) if counts[step - 1] > counts[step - 2])
    before, after = load_checkpoint(run, silent - 1), load_checkpoint(run, silent)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lines[silent - 1]["loss"] is None


def test_skipped_first_steps_cause_no_warning(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet], recwarn: pytest.WarningsRecorder
) -> None:
    """Neither about a schedule that steps before the optimizer, nor about a checkpoint of a single process."""
    shards = scored_set(LENGTHS, name="silent", silent_after=4)
    settings = {"weights": {"preset": "soft-threshold"}, "batch_size": 1, "micro_batch_size": 1, "max_steps": 40}
    run = config("run", input=shards.path, log_every=1, checkpoint_every=40, **settings)
    train(run)
    assert metrics(run)[0]["no_signal_steps"] == 1  # the first step is skipped
    messages = [str(warning.message) for warning in recwarn]
    assert not [message for message in messages if "lr_scheduler" in message or "torch.distributed" in message]
