"""Training from an object store, and into one."""

import json
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import metrics, trained
from upath import UPath

from weighted_mtp.pipelines.evaluate import run as evaluate
from weighted_mtp.schemas.configs import EvaluateConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage import locks
from weighted_mtp.schemas.storage.files import copy_files, write_text
from weighted_mtp.schemas.storage.locations import Location, walk_files
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.object_store import COMPLETE, ObjectStoreCopy
from weighted_mtp.training.run.train import train

SHARD = "shard-00001-model-00001-of-00001.safetensors"
LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70] * 2
SETTINGS: dict[str, Any] = {
    "weights": {"preset": "dense"},
    "heads": {"offsets": (1, 2)},
    "optimizer": {"learning_rate": 1e-2},
    "sequence_length": 64,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 6,
    "checkpoint_every": 2,
    "log_every": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weighted-mtp"


@pytest.fixture
def config(
    s3: UPath, tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(output, place, **changes)` are the settings of a short run that reads everything from `place`."""
    shards = scored_set(LENGTHS)
    model = model_dir()
    for name, source in {"set": shards.path, "model": model}.items():
        copy_files(source, s3 / name)
        for folder in source.iterdir():
            if folder.is_dir():
                copy_files(folder, s3 / name / folder.name)
    places: dict[str, tuple[Location, Location]] = {"disk": (shards.path, model), "store": (s3 / "set", s3 / "model")}

    def build(output: Location, place: str = "disk", **changes: Any) -> TrainConfig:
        given, trunk = places[place]
        return TrainConfig(**(SETTINGS | {"input": given, "model": str(trunk), "output": output} | changes))

    return build


def assert_same(one: TrainConfig, other: TrainConfig) -> None:
    assert metrics(one) == metrics(other)
    for name, value in trained(one).items():
        assert torch.equal(value, trained(other)[name]), name


def test_a_remote_set_and_model_train_as_local_ones_do(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    local = config(tmp_path / "local")
    remote = config(tmp_path / "remote", "store")
    assert train(local)["loss"] == train(remote)["loss"]
    assert train(local.model_copy(update={"input": remote.input, "model": remote.model}))["already_complete"]
    assert evaluate(EvaluateConfig(model=remote.model, input=remote.input[0])).losses[0].loss == pytest.approx(
        evaluate(EvaluateConfig(model=local.model, input=local.input[0])).losses[0].loss
    )


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_disk(
    config: Callable[..., TrainConfig], s3: UPath, tmp_path: Path, cache: Path
) -> None:
    local, remote = (config(place / "run", trackers=["tensorboard"], keep_checkpoints=True) for place in (tmp_path, s3))
    train(local)
    train(remote)
    assert_same(local, remote)
    expected = {name for name in walk_files(local.output) if not name.startswith("wmtp/")}
    found = {name for name in walk_files(remote.output) if not name.startswith("wmtp/")}
    assert found - expected == {f"checkpoints/step-0000000{step}/{COMPLETE}" for step in (4, 6)}
    assert expected < found
    assert any("events" in name for name in walk_files(remote.output / "wmtp"))
    assert not list((cache / "runs").iterdir())
    assert train(remote)["already_complete"]
    found = [evaluate(EvaluateConfig(model=str(run.output), input=run.input[0])) for run in (local, remote)]
    assert found[0] == found[1]
    assert len(found[1].losses) == 2, "its own heads"
    assert found[1].length_source == "run"
    assert train(config(s3 / "run", trackers=["tensorboard"]))["already_complete"]
    assert not walk_files(remote.output / "checkpoints")
    with pytest.raises(UserError, match=rf"{remote.output}: holds a run with other settings \(seed\)"):
        train(config(s3 / "run", seed=1))
    assert not list((cache / "runs").iterdir())


@pytest.mark.slow
def test_a_finished_run_continues_on_another_machine(
    config: Callable[..., TrainConfig], s3: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its model is uploaded, it does not count as finished."""
    whole = config(tmp_path / "whole", continue_steps=4)
    train(whole)
    train(config(s3 / "run", keep_checkpoints=True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    longer = config(s3 / "run", continue_steps=4)
    upload = run_module.ObjectStoreCopy.upload

    def die_after_the_model(self: Any, source: Path, name: str) -> None:
        upload(self, source, name)
        if name == "model":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.ObjectStoreCopy, "upload", die_after_the_model)
        with pytest.raises(KeyboardInterrupt):
            train(longer)
    assert not (longer.output / "summary.json").exists()
    assert train(longer)["steps"] == 10
    assert_same(whole, longer)
    assert train(longer)["already_complete"]
    with pytest.raises(UserError, match=f"--continue_steps 5: {longer.output} is finished and has no checkpoints"):
        train(config(s3 / "run", continue_steps=5))


def test_a_stopped_run_goes_on_on_another_machine(
    config: Callable[..., TrainConfig], s3: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = config(tmp_path / "whole"), config(s3 / "broken")
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def stop_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    train(broken)
    assert_same(whole, broken)


DIE = """
import os, signal
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.run.object_store import ObjectStoreCopy
from weighted_mtp.training.run.train import train
complete = ObjectStoreCopy.complete_checkpoint
def die(self, name, keep):
    if name == "step-00000004": os.kill(os.getpid(), signal.SIGKILL)
    complete(self, name, keep)
ObjectStoreCopy.complete_checkpoint = die
train(TrainConfig.model_validate_json(config))
"""


@pytest.mark.slow
def test_a_checkpoint_without_its_last_object_does_not_count(
    config: Callable[..., TrainConfig],
    s3: UPath,
    tmp_path: Path,
    start_process: Callable[..., BaseProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is killed with SIGKILL when all files of the second checkpoint are there but not their list."""
    whole, broken = config(tmp_path / "whole"), config(s3 / "broken", max_checkpoints=1)
    train(whole)
    killed = start_process(DIE, config=broken.model_dump_json())
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    files = set(walk_files(broken.output / "checkpoints"))
    assert f"step-00000004/{SHARD}" in files
    assert [name for name in files if name.endswith(COMPLETE)] == [f"step-00000002/{COMPLETE}"]
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)
    continued: list[int] = []
    claim = run_module.RunDirectory.claim

    def record(self: Any, step: int, steps: int) -> None:
        claim(self, step, steps)
        continued.append(step)
        assert {name.split("/")[0] for name in walk_files(broken.output / "checkpoints")} == {"step-00000002"}

    monkeypatch.setattr(run_module.RunDirectory, "claim", record)
    train(broken)
    assert continued == [2]
    assert_same(whole, broken)
    assert not walk_files(broken.output / "checkpoints")


def test_a_checkpoint_that_lost_a_file_does_not_count(config: Callable[..., TrainConfig], s3: UPath) -> None:
    run = config(s3 / "run", keep_checkpoints=True)
    train(run)
    (run.output / "summary.json").unlink()
    (run.output / "checkpoints" / "step-00000006" / SHARD).write_bytes(b"cut")
    assert train(run)["steps"] == 6
    (run.output / "summary.json").unlink()
    damaged = run.output / "checkpoints" / "step-00000006" / SHARD
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(UserError, match=f"{run.output}/checkpoints/step-00000006: cannot be loaded"):
        train(run)


def test_names_in_the_list_of_a_checkpoint_stay_in_its_directory(s3: UPath, tmp_path: Path) -> None:
    name = "../../../../outside"
    copy = ObjectStoreCopy(s3 / "run")
    key = (copy.remote / "checkpoints" / "step-00000001").path.removeprefix("bucket/")
    for file, content in {name: b"owned", COMPLETE: json.dumps({name: 5}).encode()}.items():
        s3.fs.call_s3("put_object", Bucket="bucket", Key=f"{key}/{file}", Body=content)
    copy.download_checkpoint()
    assert not list(tmp_path.rglob("outside"))
    s3.fs.call_s3("put_object", Bucket="bucket", Key=f"{key}/{COMPLETE}", Body=b"[]")
    with pytest.raises(UserError, match=r"step-00000001/complete.json: is damaged; remove its directory and rerun"):
        copy.download_checkpoint()


def test_a_store_that_holds_something_else_is_left_alone(
    config: Callable[..., TrainConfig], s3: UPath, cache: Path
) -> None:
    run = config(s3 / "run")
    write_text(run.output / "thesis.tex", "years of work")
    with pytest.raises(UserError, match=f"{run.output}: already holds something else"):
        train(run)
    assert list(walk_files(run.output)) == ["thesis.tex"]
    assert not list((cache / "runs").iterdir())


@pytest.mark.slow
def test_two_ranks_share_one_local_copy(
    config: Callable[..., TrainConfig], launch: Callable[..., None], s3: UPath, tmp_path: Path
) -> None:
    """Two gloo processes of one machine, stopped and continued with another cache."""
    one, two = config(tmp_path / "one"), config(s3 / "two", keep_checkpoints=True)
    train(one)
    for machine, stop in enumerate((4, None)):
        launch(two, 2, stop_at=stop, XDG_CACHE_HOME=str(tmp_path / f"machine {machine}"))
        found = walk_files(two.output)
        assert {f"checkpoints/step-00000004/random-0000{rank}.pt" for rank in (0, 1)} < set(found)
        assert ("summary.json" in found) == (stop is None)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(two)[name], value, rtol=1e-3, atol=1e-4)
