"""Comparison of runs and streams by metrics, parameters and rows."""

import json
import socket
from typing import Any

import numpy as np
from safetensors.torch import load
from torch import Tensor

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.rows import Rows

LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70] * 3
"""Sequence lengths of most training runs."""


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def logged(config: TrainConfig) -> list[dict[str, Any]]:
    """All lines of `metrics.jsonl` of a run."""
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    """Logged metrics, except time and memory."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")} for line in logged(config)]


def trained(config: TrainConfig) -> dict[str, Tensor]:
    """All parameters of a finished run."""
    files = (config.output / "model" / "model.safetensors", config.output / "heads" / "heads.safetensors")
    return {name: value for file in files for name, value in load(file.read_bytes()).items()}


def assert_same_rows(one: Rows, other: Rows) -> None:
    """Assert equal tokens, positions, weights and shards."""
    for own, wanted in zip(one[:5], other[:5], strict=True):
        np.testing.assert_array_equal(own, wanted)
    assert [source.tolist() for source in one.sources] == [source.tolist() for source in other.sources]
