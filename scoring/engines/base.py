"""The interface of all engines: requests, settings and protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from weighted_mtp.schemas.shard_set.manifest import Quantity

EngineName = Literal["vllm", "transformers"]
EngineMethod = Literal["pooler", "prompt_logprobs"]


@dataclass(frozen=True)
class Request:
    """One sequence to score.

    Attributes:
        input_ids: token ids, int32, at least one.
        first_scored: first position to score.
        quantities: quantities to compute for each token, one row of the result each.
    """

    input_ids: np.ndarray
    first_scored: int = 0
    quantities: tuple[Quantity, ...] = ("loss",)

    def missing(self) -> np.ndarray:
        """An empty result: float32 NaN [quantities, len(input_ids) - first_scored]."""
        return np.full((len(self.quantities), len(self.input_ids) - self.first_scored), np.nan, dtype=np.float32)


class Engine(Protocol):
    """A frozen causal language model."""

    @property
    def computed_tokens(self) -> int:
        """Tokens computed so far."""
        ...

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """Score the tokens of each sequence given the tokens before them.

        Returns:
            For each request a float32 array [quantities, len(input_ids) - first_scored]. `loss` is the negative
            log-likelihood of the token, in nats. `entropy` is the entropy of the distribution that predicts the token,
            in nats. `gradient` is the L2 norm of the gradient of the summed losses of the scored tokens with respect to
            the token's input embedding, clipped to the float16 range; only engines that compute gradients return it.
            Position 0, which has no context, is NaN.
        """
        ...


@dataclass(frozen=True)
class EngineConfig:
    """Settings of all engines of a job, independent of the model.

    Attributes:
        name: implementation.
        method: how vLLM returns losses; None for the transformers engine.
        dtype: compute dtype of the model. Losses are always float32; logits are too, except for quantised heads.
        batch_tokens: tokens computed at once.
        max_length: tokens in the longest sequence.
        threads: CPU threads of one worker.
        on_gpu: whether models run on a GPU.
        tensor_parallel_size: GPUs that share one model, or processes on a CPU.
        engine_args: additional arguments for vLLM's `EngineArgs`.
        trust_remote_code: whether Python code of the models may run.
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
    trust_remote_code: bool = False

    @property
    def batch(self) -> int:
        """Tokens computed at once: `max_num_batched_tokens` if given, else `batch_tokens`."""
        return int(self.engine_args.get("max_num_batched_tokens", self.batch_tokens))

    def with_batch(self, batch_tokens: int) -> "EngineConfig":
        """A copy that computes at most `batch_tokens` tokens at once."""
        arguments = {name: value for name, value in self.engine_args.items() if name != "max_num_batched_tokens"}
        if "max_num_seqs" in arguments:
            arguments["max_num_seqs"] = min(int(arguments["max_num_seqs"]), batch_tokens)
        return replace(self, batch_tokens=batch_tokens, engine_args=arguments)
