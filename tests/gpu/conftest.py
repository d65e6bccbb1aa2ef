"""The device of the tests marked `gpu`, and engines that load on it."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine


@pytest.fixture(scope="session")
def rehearsed(request: pytest.FixtureRequest) -> bool:
    """Whether the tests run on a CPU, in small."""
    return bool(request.config.getoption("--rehearse"))


@pytest.fixture(scope="session", autouse=True)
def device(rehearsed: bool) -> torch.device:
    """The GPU; in a rehearsal the CPU."""
    if not rehearsed and not torch.cuda.is_available():
        pytest.skip("needs a GPU; 'make gpu ARGS=--rehearse' runs this on the CPU")
    return torch.device("cpu" if rehearsed else "cuda")


@pytest.fixture(scope="session")
def start_process() -> Callable[..., BaseProcess]:
    """`start_process(script, **variables)` runs a script with global variables in a process of its own.

    It is not forked: CUDA does not work in the children of a process that has counted the GPUs.
    """
    context = get_context("spawn")

    def start(script: str, **variables: object) -> BaseProcess:
        process = context.Process(target=exec, args=(script, variables), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def engine_config(device: torch.device) -> Callable[..., EngineConfig]:
    """`engine_config(name, **settings)` are the settings of an engine on the device, in bfloat16."""

    def make(name: str, **settings: Any) -> EngineConfig:
        method = "pooler" if name == "vllm" else None
        defaults = {"method": method, "dtype": "bfloat16", "batch_tokens": 8192, "max_length": 1024, "threads": 1}
        return EngineConfig(name, **defaults | {"on_gpu": device.type == "cuda"} | settings)

    return make


@pytest.fixture(scope="session")
def make_engine(engine_config: Callable[..., EngineConfig]) -> Callable[..., Engine]:
    """Load engines and keep them: vLLM takes down what all engines of a process share, with the first that goes."""
    kept = []

    def load(model: Path, name: str, **settings: Any) -> Engine:
        kept.append(load_engine(model, engine_config(name, **settings)))
        return kept[-1]

    return load


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    """A small Llama whose attention heads every kernel accepts."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return make_model(**sizes, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def random_requests() -> Callable[..., list[Request]]:
    """`random_requests(lengths)` are sequences of random token ids of the test tokenizer."""

    def make(lengths: list[int], quantities: tuple[Any, ...] = ("loss",)) -> list[Request]:
        rng = np.random.default_rng(0)
        return [Request(rng.integers(0, 258, length).astype(np.int32), 0, quantities) for length in lengths]

    return make
