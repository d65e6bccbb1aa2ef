"""Checkpoints: resumed runs equal uninterrupted ones bit for bit, and damaged files are named."""

import errno
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import metrics, trained
from safetensors.torch import load_file

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("die_at", "architecture", "block", "dtype", "weights"),
    [
        (4, "llama", "residual", "float32", {"formula": "normalise(live, by=batch)", "control": "shuffled"}),
        (8, "llama-tied", "decoder", "float32", {"formula": "top(long_short, 0.5, by=batch)", "control": "random"}),
        (12, "gpt2-dropout", "decoder", "bfloat16", {"preset": "dense"}),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    die_at: int,
    architecture: str,
    block: str,
    dtype: str,
    weights: dict[str, str],
    config: Callable[..., TrainConfig],
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "model": str(model_dir(architecture, seed=1)),
        "heads": {"offsets": (1, 2), "block": block},
        "dtype": dtype,
        "weights": weights | {"warmup_ratio": 0.5},
        "max_steps": 12,
        "checkpoint_every": 4,
    }
    # Evaluations on the way must not matter either: they switch dropout off, and on again.
    whole, broken = config("whole", eval_every=5, **settings), config("broken", **settings)
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def die_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        if step == die_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    torch.manual_seed(die_at)  # a new process would not share this one's random state
    train(broken)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name
    steps = [[line for line in metrics(run) if "loss" in line] for run in (whole, broken)]
    assert steps[0] == steps[1]


SAVE_AND_DIE = """
import os, signal
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.run.checkpoint import TrainingState
from weighted_mtp.training.run.train import train
save = TrainingState.save
def save_and_die(self, accelerator, path):
    save(self, accelerator, path)
    if path.name.endswith("step-00000008"): os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = save_and_die
train(TrainConfig.model_validate_json(config))
"""


def test_eight_bit_moments_resume_bit_for_bit(
    config: Callable[..., TrainConfig], model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    settings = {"model": str(model_dir("llama-wide")), "optimizer": {"kind": "adamw8bit"}, "checkpoint_every": 2}
    whole, broken = config("whole", **settings), config("broken", **settings)
    save = run_module.RunDirectory.save_checkpoint

    def die_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with torch.compiler.set_stance("force_eager"):
        train(whole)
        with monkeypatch.context() as patch:
            patch.setattr(run_module.RunDirectory, "save_checkpoint", die_after_saving)
            with pytest.raises(KeyboardInterrupt):
                train(broken)
        saved = load_file(broken.output / "checkpoints" / "step-00000002" / SHARD)
        assert saved["optimizer.trunk.lm_head.weight.exp_avg.codes"].dtype == torch.uint8
        train(broken)
    assert metrics(whole) == metrics(broken)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name


def test_killed_process_resumes_and_its_unfinished_files_do_no_harm(
    config: Callable[..., TrainConfig], start_process: Callable[..., BaseProcess]
) -> None:
    """A real process, killed with SIGKILL while it saves its second checkpoint."""
    whole, broken = (config(name, max_steps=12, checkpoint_every=4) for name in ("whole", "broken"))
    killed = start_process(SAVE_AND_DIE, config=broken.model_dump_json())
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (broken.output / "checkpoints").iterdir()) == [
        ".step-00000008",
        "step-00000004",
    ]
    with open(broken.output / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 0')  # a line cut short by the kill
    train(broken)
    train(whole)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name
    assert metrics(whole) == metrics(broken)


def test_damaged_files_of_a_run_are_named(config: Callable[..., TrainConfig]) -> None:
    run = config("run", keep_checkpoints=True)
    train(run)
    (run.output / "summary.json").unlink()
    checkpoint = run.output / "checkpoints" / "step-00000006"
    (checkpoint / SHARD).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"step-00000006: cannot be loaded .* remove it to continue"):
        train(run)
    shutil.rmtree(checkpoint)
    train(run)
    (run.output / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json: is damaged"):
        train(run)


def test_a_state_that_is_not_of_the_run_is_refused(config: Callable[..., TrainConfig]) -> None:
    run = config("run", keep_checkpoints=True)
    train(run)
    (run.output / "summary.json").unlink()
    file = run.output / "checkpoints" / "step-00000006" / "state.pt"
    state = torch.load(file)
    for part, change, reason in (
        ("loop", {"step": "6"}, "step has another type"),
        ("loop", {"step": 50}, "it is after step 50, and the run has 6 steps with --continue_steps 0"),
        ("loop", {"metrics": {"loss": "x"}}, "metrics has another type"),
        ("loop", {"window": {}}, "window has another type"),
        ("scheduler", {"last_epoch": "6"}, ""),
        ("scheduler", {"last_epoch": 50}, "it is after step 6"),
    ):
        torch.save(state | {part: state[part] | change}, file)
        with pytest.raises(UserError, match=rf"step-00000006: cannot be loaded \(.*{reason}"):
            train(run)
    # The settings determine the rest of the schedule.
    torch.save(state | {"scheduler": state["scheduler"] | {"base_lrs": [1.0] * 9, "_last_lr": []}}, file)
    assert train(run.model_copy(update={"continue_steps": 1}))["steps"] == 7


def test_a_full_disk_at_a_checkpoint_is_one_line(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config("run", checkpoint_every=4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", full)
        with pytest.raises(UserError, match=r"step-00000004: cannot be written \(.*No space left.*free some space"):
            train(run)
    assert not list((run.output / "checkpoints").iterdir())
    assert train(run)["steps"] == 6
