"""Whole training runs: resuming, accumulation, ranks, and every mistake a user can make."""

import errno
import json
import math
import shutil
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparing import metrics, trained
from safetensors.torch import load_file
from torch import Tensor

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import write_manifest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.train import train
from weighted_mtp.training.trainer import TrainingLoop

SHARD = "shard-00001-model-00001-of-00001.safetensors"
LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70] * 3


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of a short run of a Llama on 36 sequences."""
    model = model_dir()
    shards = scored_set(LENGTHS)
    held_out = scored_set(LENGTHS[:6], name="held-out", seed=1)
    defaults: dict[str, Any] = {
        "input": shards.path,
        "model": str(model),
        "eval_input": held_out.path,
        "weights": {"preset": "dense", "lam": 0.25},
        "heads": {"offsets": (1, 2)},
        "optimizer": {"learning_rate": 1e-2},
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 6,
        "checkpoint_every": 100,
        "log_every": 3,
    }
    return lambda name, **changes: TrainConfig(**(defaults | {"output": tmp_path / name} | changes))


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
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(two)[name], value, rtol=1e-3, atol=1e-4)


def test_training_learns_and_reports(config: Callable[..., TrainConfig]) -> None:
    run = config("run", max_steps=30, weights={"preset": "uniform"}, eval_every=15, checkpoint_every=14)
    summary = train(run)
    logged = metrics(run)
    assert logged[-2]["loss"] < logged[0]["loss"] - 0.5  # random bytes can only be memorised
    assert [line["step"] for line in logged if "eval_loss_1" in line] == [15, 30]
    assert 0.8 * 30 * 4 * 64 < summary["tokens"] < 30 * 4 * 64  # without padding
    assert sorted(path.name for path in (run.output / "checkpoints").iterdir()) == ["step-00000028", "step-00000030"]
    assert train(run)["already_complete"]


def test_weight_share_is_reported(config: Callable[..., TrainConfig]) -> None:
    run = config("run", weights={"preset": "rho1-static", "fraction": 0.25}, max_steps=20)
    assert train(run)["selected_share"] == pytest.approx(0.25, abs=0.06)


def test_other_settings_are_refused_by_name(config: Callable[..., TrainConfig]) -> None:
    train(config("run"))
    with pytest.raises(UserError, match=r"other settings \(optimizer.learning_rate, weights.lam\)"):
        train(config("run", optimizer={"learning_rate": 1e-3}, weights={"preset": "dense", "lam": 0.5}))


def test_foreign_directory_is_left_alone(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("\\section{}")
    with pytest.raises(UserError, match="already holds something else"):
        train(run)
    assert [path.name for path in run.output.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("max_steps", [1, 6])
def test_diverged_model_is_not_saved(max_steps: int, config: Callable[..., TrainConfig]) -> None:
    """With one step the loss is still finite, and only the update is not. A corrected run may use the directory."""
    run = config("run", optimizer={"learning_rate": 1e38, "warmup_ratio": 0.0}, max_steps=max_steps)
    with pytest.raises(UserError, match="not finite"):
        train(run)
    assert not list((run.output / "checkpoints").glob("step-*"))
    assert not (run.output / "model").exists()
    assert train(config("run", max_steps=max_steps))["steps"] == max_steps


def test_a_refused_start_claims_nothing(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """The remedy of the error works on the same output."""
    long = scored_set([300, 20], name="long")
    with pytest.raises(UserError, match="give --sequence_length 128"):
        train(config("run", input=long.path, sequence_length=None))
    assert not (long.path.parent / "run").exists()
    train(config("run", input=long.path, sequence_length=128, max_steps=1))


def test_an_epoch_sees_the_whole_corpus(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """Two sequences of 40 do not fit a row of 64: steps must follow the rows, not the tokens."""
    shards = scored_set([40] * 24, name="forties")
    summary = train(config("run", input=shards.path, max_steps=None, epochs=1.0))
    assert summary["steps"] == 6
    assert summary["tokens"] == shards.manifest.tokens


def test_damaged_files_of_a_run_are_named(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
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


def test_tracker_that_is_not_installed_is_named(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="the package of 'aim' is not installed"):
        train(config("run", trackers=("aim",)))
    run = config("board", trackers=("tensorboard",))
    train(run)
    assert list((run.output / "wmtp").rglob("events*"))


def test_wrong_tokenizer_is_refused(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    tokenizer = Path(run.model) / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer is not that of"):
        train(run)
    assert not run.output.exists()


def test_rows_are_as_long_as_the_longest_sequences_by_default(config: Callable[..., TrainConfig]) -> None:
    run = config("run", sequence_length=None, max_steps=1)
    train(run)
    assert json.loads((run.output / "run.json").read_text())["config"]["sequence_length"] == max(LENGTHS)


@pytest.fixture
def add_column(make_shard_set: Callable[..., ShardSet]) -> Callable[..., ShardSet]:
    """`add_column(shards, name)` writes a set of the same rows with one column: `excess_loss` with the other sign.

    With `keep` it holds `excess_loss` itself, too.
    """

    def add(shards: ShardSet, name: str, column: str = "loss_b", keep: bool = False) -> ShardSet:
        rows = [row for shard in range(len(shards.manifest.shards)) for row in shards.read(shard).to_pylist()]
        columns = {"excess_loss": [row["excess_loss"] for row in rows]} if keep else {}
        columns[column] = [[-score for score in row["excess_loss"]] for row in rows]
        return make_shard_set([row["input_ids"] for row in rows], columns, name, shards.manifest.shards[0].rows)

    return add


def test_a_second_set_changes_nothing_but_what_its_column_weighs(
    config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]
) -> None:
    """Uniform weights give the same losses with it; its column gives those of a set that holds the column itself."""
    one = config("one", max_steps=4, weights={"preset": "uniform"})
    first = ShardSet.open(one.input[0])
    second, both = add_column(first, "second"), add_column(first, "both", keep=True)
    two = config("two", max_steps=4, weights={"preset": "uniform"}, input=f"{first.path},{second.path}")
    weights = {"preset": "rho1-static", "column": "loss_b", "fraction": 0.3}
    zipped = config("zipped", max_steps=4, weights=weights, input=(first.path, second.path))
    whole = config("whole", max_steps=4, weights=weights, input=both.path)
    for run in (one, two, zipped, whole):
        train(run)
    assert metrics(one) == metrics(two)
    assert metrics(zipped) == metrics(whole)
    assert metrics(zipped) != metrics(one)


def test_a_run_continues_only_with_the_same_sets(
    config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]
) -> None:
    first = ShardSet.open(config("run").input[0])
    second, third = add_column(first, "second"), add_column(first, "third", column="loss_c")
    run = config("run", input=(first.path, second.path), max_steps=4)
    train(run)
    written = yaml.safe_load((run.output / "config.yaml").read_text())
    assert written["input"] == [str(first.path), str(second.path)]
    assert train(TrainConfig.model_validate(written))["already_complete"]
    for sets in [(first, third), (first, second, third), (first,), (second, first)]:
        with pytest.raises(UserError, match=r"other settings \(inputs.input\)"):
            train(config("run", input=tuple(shards.path for shards in sets), max_steps=4))


def test_a_mixture_continues_bit_for_bit_and_only_as_it_was(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of threads may change on the way; sets and shares may not."""
    second, third = (scored_set(LENGTHS, name=name, seed=seed) for seed, name in enumerate(("second", "third"), 2))
    mix = {str(second.path): 0.3, str(third.path): 0.2}
    config = partial(config, checkpoint_every=2)
    whole, broken = config("whole", mix=mix), config("broken", mix=mix)
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def stop_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    reordered = dict(reversed(mix.items()))
    for other in ({}, {str(second.path): 0.3}, {**mix, str(third.path): 0.1}, reordered):
        with pytest.raises(UserError, match=r"other settings \(inputs.mix\)"):
            train(config("broken", mix=other))
    train(config("broken", mix=mix, loader_workers=3))
    assert metrics(whole) == metrics(broken)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name


def test_mixed_sets_are_checked_like_the_first(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet], make_shard_set: Callable[..., ShardSet]
) -> None:
    long = scored_set([300, 20], name="long")
    with pytest.raises(UserError, match=r"/long has sequences of up to 300; give --sequence_length 128"):
        train(config("run", mix={str(long.path): 0.1}, sequence_length=None))
    bare = make_shard_set([[1, 2, 3]], name="bare")
    with pytest.raises(UserError, match=r"no column 'long_short' in .*/bare"):
        train(config("run", mix={str(bare.path): 0.1}))
    manifest = bare.manifest.model_copy(
        update={"tokenizer": bare.manifest.tokenizer.model_copy(update={"fingerprint": "other"})}
    )
    write_manifest(bare.path, manifest)
    with pytest.raises(UserError, match=r"/bare: has another tokenizer than .*/set"):
        train(config("run", mix={str(bare.path): 0.1}))
    assert not config("run").output.exists()


def test_an_epoch_of_a_mixture_is_one_of_the_input(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    shards, other = scored_set([64] * 24, name="rows"), scored_set([64] * 3, name="few", seed=1)
    run = config("run", input=shards.path, mix={str(other.path): 0.25}, max_steps=None, epochs=1.0)
    assert train(run)["steps"] == 8


def test_a_mixed_set_may_be_zipped(config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]) -> None:
    """Its column may lie in another set than its tokens."""
    first = ShardSet.open(config("run").input[0])
    second, both = add_column(first, "second"), add_column(first, "both", keep=True)
    weights = {"preset": "rho1-static", "column": "loss_b", "fraction": 0.3}
    runs = [
        config(name, input=both.path, mix={mixed: 0.5}, weights=weights, max_steps=4)
        for name, mixed in (("zipped", f"{first.path},{second.path}"), ("whole", str(both.path)))
    ]
    for run in runs:
        train(run)
    assert metrics(runs[0]) == metrics(runs[1])


def test_a_bad_step_is_skipped_and_counted(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch of step 4 has an infinite loss: that step must leave no trace but a count."""
    run = config("run", log_every=1, checkpoint_every=1, keep_checkpoints=6)
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
        keep_checkpoints=12, max_steps=12, optimizer={"learning_rate": 1e-2, "warmup_ratio": 0.0},
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


def test_live_weights_fix_the_passes_that_they_are_ranked_in(config: Callable[..., TrainConfig]) -> None:
    live = {"preset": "rho1", "column": "long_short"}
    train(config("run", weights=live))
    with pytest.raises(UserError, match=r"other settings \(passes.micro_batch_size\)"):
        train(config("run", weights=live, micro_batch_size=4))


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


def test_a_run_that_learnt_nothing_is_no_success(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    shards = scored_set(LENGTHS, name="silent", silent_after=1)
    run = config(
        "run", input=shards.path, weights={"preset": "soft-threshold"}, batch_size=1, micro_batch_size=1, max_steps=1
    )
    with pytest.raises(UserError, match="none of the 1 steps had a target with weight"):
        train(run)
    assert not (run.output / "model").exists()
