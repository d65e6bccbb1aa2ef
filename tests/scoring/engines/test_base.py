"""Both engines against a plain loop over the model's own logits."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine

TOLERANCE = 1e-4
ENGINES = ["transformers", "vllm-pooler", "vllm-prompt_logprobs"]


def engine_config(name: str, batch_tokens: int) -> EngineConfig:
    name, _, method = name.partition("-")
    return EngineConfig(name, method or None, "float32", batch_tokens=batch_tokens, max_length=256, threads=1)


def losses_of(engine: Engine, sequences: list[np.ndarray], first_scored: list[int] | None = None) -> list[np.ndarray]:
    firsts = first_scored or [0] * len(sequences)
    return [scores[0] for scores in engine.score([Request(*pair) for pair in zip(sequences, firsts, strict=True)])]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 258, length).astype(np.int32) for length in (40, 1, 256, 2, 100, 33, 1, 256)]


@pytest.fixture(scope="module")
def expected(
    sequences: list[np.ndarray], reference_model: Path, loop_losses: Callable[[torch.nn.Module, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    return [loop_losses(model, ids) for ids in sequences]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, size), marks=() if name == "transformers" else pytest.mark.integration)
        for name, size in itertools.product(ENGINES, ["small", "large"])
    ],
)
def engine(request: pytest.FixtureRequest, reference_model: Path) -> Engine:
    name, size = request.param
    if name != "transformers":
        request.getfixturevalue("vllm_installed")
    # 48 tokens are less than most sequences: vLLM must cut them into chunks, transformers must let them stand alone.
    return load_engine(reference_model, engine_config(name, 48 if size == "small" else 8192))


def test_losses_equal_the_definition(engine, sequences, expected):
    losses = losses_of(engine, sequences)
    for result, wanted in zip(losses, expected, strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, rtol=0, atol=TOLERANCE)


def test_results_start_at_the_first_scored_position(engine, sequences, expected):
    first_scored = [7, 0, 200, 1, 0, 32, 0, 255]
    losses = losses_of(engine, sequences, first_scored)
    for result, wanted, first in zip(losses, expected, first_scored, strict=True):
        np.testing.assert_allclose(result, wanted[first:], rtol=0, atol=TOLERANCE)


def test_no_work_and_no_context(engine):
    assert engine.score([]) == []
    (alone,) = losses_of(engine, [np.array([5], np.int32)])
    assert np.isnan(alone).tolist() == [True]


def test_equal_requests_give_equal_bits(engine, sequences):
    first, second = (losses_of(engine, sequences) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()
