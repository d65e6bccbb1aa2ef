"""`wmtp train --ray_workers` trains as one process does, and the output of workers reaches the driver."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from reach import LOOPBACK, named_sockets, open_ports
from safetensors.torch import load_file

from weighted_mtp.pipelines import train as train_command
from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

pytestmark = pytest.mark.slow
LEARNING_RATE = 1e-3


@pytest.fixture
def config(
    tmp_path: Path, make_model: Callable[..., Path], make_shard_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of a short run of a Llama on random bytes."""
    rng = np.random.default_rng(0)
    shards = make_shard_set([rng.integers(0, 256, length).tolist() for length in (40, 90, 7, 120, 33, 64)])
    defaults: dict[str, Any] = {
        "input": shards.path,
        "model": str(make_model()),
        "heads": {"offsets": (1, 2)},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 1,
        "max_steps": 10,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return lambda name, **changes: TrainConfig(**(defaults | {"output": tmp_path / name} | changes))


def losses(config: TrainConfig) -> list[float]:
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_ray_train_equals_one_process(
    config: Callable[..., TrainConfig],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relative paths mean the same in workers. The driver shows progress, as a bar on a terminal, and the summary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    one, two = config("one"), config("two", output=Path("two"), ray_workers=2, fsdp=True)
    train_command.run(one)
    capfd.readouterr()
    train_command.run(two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    for name, value in load_file(one.output / "model" / "model.safetensors").items():
        torch.testing.assert_close(load_file(two.output / "model" / "model.safetensors")[name], value)
    printed, shown = capfd.readouterr()
    assert "two: trained" in printed
    assert "10/10" in shown


def test_an_error_of_workers_is_one_line(config: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]) -> None:
    run = config("run", ray_workers=2, batch_size=3)
    file = run.output.with_suffix(".json")
    file.write_text(run.model_dump_json())
    assert main(["train", "--config", str(file)]) == 1
    printed, shown = capfd.readouterr()
    assert not printed
    assert shown == "wmtp train: error: --batch_size 3: give a multiple of the 2 processes\n"


def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    config: Callable[..., TrainConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = config("one", max_steps=60), config("two", max_steps=60, ray_workers=2)
    train_command.run(one)
    capfd.readouterr()
    checkpoint = two.output / "checkpoints" / "step-00000010"

    def kill_one() -> None:
        while not checkpoint.exists():
            time.sleep(0.01)
        processes = psutil.Process().children(recursive=True)
        next(process for process in processes if process.name().startswith("ray::RayTrain")).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    train_command.run(two)
    killer.join()
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    shown = capfd.readouterr().err
    assert "\rtrain:" not in shown, "no bar where the driver has no terminal"
    assert shown.count("wmtp train: a worker failed (its process died: killed, crashed, or out of memory)") == 1
    assert "continuing from step-000000" in shown


def test_only_the_rendezvous_of_torch_listens_beyond_loopback(config: Callable[..., TrainConfig]) -> None:
    """The Ray that the command starts is out of reach of other users, and is gone at the end."""
    run = config("run", ray_workers=2, max_steps=100_000)
    file = run.output.with_suffix(".json")
    file.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "weighted_mtp", "train", "--config", str(file)]
    with tempfile.TemporaryDirectory() as path:
        temporary = Path(path)
        driver = subprocess.Popen(command, env={**os.environ, "TMPDIR": path}, stderr=subprocess.DEVNULL)
        try:
            while not (run.output / "checkpoints" / "step-00000005").exists():
                assert driver.poll() is None
                time.sleep(0.05)
            tree = psutil.Process(driver.pid).children(recursive=True)
            ports, sockets = open_ports(tree), named_sockets(tree)
            assert len([process for process in tree if process.name().startswith("ray::RayTrain")]) == 2
            (beyond,) = (name for (ip, _), name in ports.items() if ip not in LOOPBACK)
            assert beyond.startswith("ray::RayTrain")
            (directory,) = temporary.glob("wmtp-*")
            assert sockets
            assert all(socket.is_relative_to(directory) for socket in sockets), sockets
            assert {entry.stat().st_mode & 0o777 for entry in temporary.iterdir()} == {0o700}
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(60) == 128 + signal.SIGTERM
        finally:
            driver.kill()
        assert list(temporary.iterdir()) == []
