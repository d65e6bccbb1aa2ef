"""Engines that stay loaded during a test, and the definition of a loss."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine

LENGTHS = (40, 2, 256, 100, 33, 1, 256)
FIRST_SCORED = (0, 0, 200, 7, 32, 0, 1)


@pytest.fixture(scope="session")
def loop_losses() -> Callable[[torch.nn.Module, np.ndarray], np.ndarray]:
    """-log p of every token, from the definition: one forward pass for each prefix."""

    def compute(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
        losses = [float("nan")]
        for position in range(1, len(ids)):
            with torch.inference_mode():
                logits = model(torch.from_numpy(ids[:position].astype(np.int64))[None]).logits[0, -1]
            losses.append(float(-logits.double().log_softmax(-1)[ids[position]]))
        return np.asarray(losses)

    return compute


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 258, length).astype(np.int32) for length in LENGTHS]
    return [
        Request(ids, first, ("loss", "entropy") if row % 2 == 0 else ("loss",))
        for row, (ids, first) in enumerate(zip(sequences, FIRST_SCORED, strict=True))
    ]


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Load engines and keep them until the end of the test: vLLM takes down what all engines of a process share."""
    kept = []

    def load(model: Path, name: str = "vllm", **settings: object) -> Engine:
        defaults = {"method": "pooler" if name == "vllm" else None, "dtype": "float32", "batch_tokens": 48}
        kept.append(load_engine(model, EngineConfig(name, **defaults | settings, max_length=256, threads=1)))
        return kept[-1]

    return load


@pytest.fixture(scope="session")
def largest_difference() -> Callable[[list[np.ndarray], list[np.ndarray]], float]:
    """Largest absolute difference; NaN must be at the same places."""

    def compare(one: list[np.ndarray], other: list[np.ndarray]) -> float:
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        return max(float(np.nanmax(np.abs(a - b), initial=0)) for a, b in zip(one, other, strict=True))

    return compare
