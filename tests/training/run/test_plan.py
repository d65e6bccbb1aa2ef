"""The plan of a run: its length, its devices, and that nothing is written or loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from weighted_mtp.pipelines.train import run
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.run.plan import plan
from weighted_mtp.training.run.train import train


def test_the_length_is_that_of_the_run(config: Callable[..., TrainConfig]) -> None:
    settings = config("run", max_steps=None, epochs=2, checkpoint_every=1000)
    planned = plan(settings.model_copy(update={"dry_run": True}))
    assert not settings.output.exists()
    summary = train(settings)
    assert planned.length.steps == summary["steps"]
    assert planned.length.tokens == pytest.approx(summary["tokens"], rel=0.1)
    assert planned.length.epochs == pytest.approx(2, rel=0.1)
    assert planned.length.weighted_targets / planned.length.targets == pytest.approx(summary["selected_share"], rel=0.1)


def test_a_config_is_enough_and_nothing_is_written(
    config: Callable[..., TrainConfig], model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Four GPUs are planned where there is none."""
    model = model_dir("llama-tied")
    (model / "model.safetensors").unlink()
    settings = config("run", model=str(model), fsdp=True, dry_run=True)
    devices = {"processes": 4, "device": "cuda", "memory_gib": 1e-6}
    before = sorted(settings.output.parent.rglob("*"))
    with pytest.raises(UserError, match=r"does not fit into the memory of the devices; try .* adamw8bit"):
        run(TrainConfig.model_validate(settings.model_dump() | {"plan": devices}))
    assert sorted(settings.output.parent.rglob("*")) == before
    screen = capsys.readouterr().out
    for part in ("4 GPUs, FSDP2, bfloat16", "does not fit, lacks", "planned peak", "moments", "sdpa attention", " MiB"):
        assert part in screen
    enough = devices | {"memory_gib": 1}
    assert run(TrainConfig.model_validate(settings.model_dump() | {"plan": enough})) is None
    assert "fits, and leaves" in capsys.readouterr().out


def test_processes_and_sharding_of_the_launcher(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    run(config("run", dry_run=True))
    assert "2 CPU processes, FSDP2, float32" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    run(config("run", dry_run=True))
    assert not capsys.readouterr().out


def test_a_batch_that_the_planned_processes_cannot_share(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="--batch_size 4: give a multiple of the 3 processes"):
        plan(config("run", dry_run=True, plan={"processes": 3}))


def test_a_plan_needs_a_dry_run(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="--plan needs --dry_run"):
        config("run", plan={"processes": 3})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2-dropout", "gpt_neox", "phi3"])
@pytest.mark.parametrize("block", ["residual", "decoder"])
def test_architectures(
    architecture: str, block: str, config: Callable[..., TrainConfig], model_dir: Callable[..., Path]
) -> None:
    heads = {"offsets": (1, 2), "block": block}
    planned = plan(
        config("run", model=str(model_dir(architecture)), heads=heads, activation_checkpointing=True, dry_run=True)
    )
    assert planned.memory.peak > 4 * planned.memory.parts["parameters"]
    assert planned.attention == ("eager" if architecture == "gemma2" else "sdpa")


def test_a_finished_run_with_its_heads(config: Callable[..., TrainConfig]) -> None:
    first = config("first", max_steps=1)
    train(first)
    assert plan(config("second", model=str(first.output), dry_run=True)).trainable > 0


def test_a_missing_package_of_the_optimizer(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weighted_mtp.training.run.preconditions.is_installed", lambda _: False)
    with pytest.raises(UserError, match=r"torchao is not installed; install weighted-mtp\[adamw8bit\]"):
        train(config("run", optimizer={"kind": "adamw8bit"}))
