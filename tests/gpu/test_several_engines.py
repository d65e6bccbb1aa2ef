"""Two engines that share one GPU."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import read_shard

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, shard_name
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request

TOLERANCE = 0.4
"""Nats, root mean square: vLLM and transformers round differently in bfloat16, and random models amplify it."""
WAIT = 240
"""Seconds that one engine waits for the other."""

ENGINE = """
import numpy as np
from weighted_mtp.scoring.engines.loading import load_engine
engine = load_engine(model, config)
both_loaded.wait(wait)
scores = engine.score(requests)
both_loaded.wait(wait)  # neither ends before the other has scored
np.save(output, np.concatenate([score[0] for score in scores]))
"""

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_installed")]


@pytest.fixture(scope="module")
def requests(random_requests: Callable[..., list[Request]]) -> list[Request]:
    return random_requests([1024, 300, 77, 512] * 4)


def difference(losses: np.ndarray, expected: list[np.ndarray]) -> float:
    """Root mean square difference of the losses of all tokens that have a context, in nats."""
    return float(np.sqrt(np.nanmean((losses - np.concatenate([score[0] for score in expected])) ** 2)))


def test_two_processes_with_an_engine_each(
    model: Path,
    requests: list[Request],
    make_engine: Callable[..., Engine],
    engine_config: Callable[..., EngineConfig],
    start_process: Callable[..., BaseProcess],
    tmp_path: Path,
    record_property: Any,
) -> None:
    """Both hold their weights and caches while both score."""
    both_loaded = get_context("spawn").Barrier(2)
    outputs = [tmp_path / "one.npy", tmp_path / "two.npy"]
    processes = [
        start_process(
            ENGINE,
            model=model,
            config=engine_config("vllm"),
            requests=requests,
            both_loaded=both_loaded,
            wait=WAIT,
            output=output,
        )
        for output in outputs
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    expected = make_engine(model, "transformers").score(requests)
    for output in outputs:
        record_property("rms_nats", difference(np.load(output), expected))
        assert difference(np.load(output), expected) < TOLERANCE


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_two_workers_of_a_job_share_the_device(
    model: Path,
    requests: list[Request],
    make_engine: Callable[..., Engine],
    make_shard_set: Callable[..., ShardSet],
    device: torch.device,
    tmp_path: Path,
) -> None:
    """`wmtp score` on one GPU, or on a core of a CPU. It does not start before both workers fit."""
    ids = [request.input_ids.tolist() for request in requests]
    shards = make_shard_set(ids, rows_per_shard=4)
    share = ["--gpus_per_worker", "0.5"] if device.type == "cuda" else ["--cpus_per_worker", "0.5"]
    command = [sys.executable, "-m", "weighted_mtp", "score", "--input", str(shards.path), "--reference", str(model)]
    command += [
        "--output",
        str(tmp_path / "scored"),
        "--dtype",
        "bfloat16",
        "--workers",
        "2",
        "--min_workers",
        "2",
        *share,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = [read_shard(tmp_path / "scored" / "data" / shard_name(number, 4)) for number in range(4)]
    losses = np.concatenate([flat_values(table["loss_reference"]) for table in read])
    assert difference(losses, make_engine(model, "transformers").score(requests)) < TOLERANCE
