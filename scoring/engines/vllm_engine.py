"""Token losses by vLLM.

The method `pooler` computes them inside the engine (see `scoring.engines.vllm_scorer`). The method `prompt_logprobs`
uses nothing but vLLM's public API: prompt log-probabilities of a request that generates one token.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.scoring.engines.base import EngineConfig, Request, architectures, engine_version, is_recurrent
from weighted_mtp.scoring.engines.vllm_plugin import SCORE_TOKENS, register

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker process is the engine
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token more than the model reads is planned for, and never computed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else tensor parallel wants a NUMA node for each process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
LINES: tuple[Quantity, ...] = ("loss", "entropy")
"""What vLLM returns for each token, in this order; the second only where it is asked for."""
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
STATE_BYTES = 1 << 30
"""For the states of recurrent layers; `--engine_args.kv_cache_memory_bytes` is the way out where they need more."""


class VllmEngine:
    """An engine on `vllm.LLMEngine`, inside the calling process."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint and reserve memory for its key-value cache."""
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        import torch

        torch.set_num_threads(config.threads)
        from vllm import EngineArgs, LLMEngine

        if config.method == "pooler":
            os.environ[SCORE_TOKENS] = ",".join(architectures(AutoConfig.from_pretrained(model)))
            register()  # vLLM itself calls plugins once, and this may not be the first engine of the process
            self.make_params, self.read = pooling_params, pooled_scores
        else:
            self.make_params, self.read = sampling_params, prompt_losses
        self.engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(model, config)))
        self.computed_tokens = 0
        self.in_flight = 2 * self.engine.vllm_config.scheduler_config.max_num_seqs

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        from vllm.inputs import tokens_input

        results = [request.missing() for request in requests]
        waiting = [number for number, request in enumerate(requests) if len(request.input_ids) > 1]
        waiting.reverse()
        running: set[str] = set()
        try:
            while waiting or running:
                # The scheduler always has enough to choose from, and ids exist as Python lists only for so long.
                while waiting and len(running) < self.in_flight:
                    request = requests[waiting[-1]]
                    prompt = tokens_input(request.input_ids.tolist())
                    self.engine.add_request(str(waiting[-1]), prompt, self.make_params(request))
                    running.add(str(waiting.pop()))
                for output in self.engine.step():
                    scores = self.read(output)
                    number = int(output.request_id)
                    result = results[number]
                    scores = scores[[LINES.index(quantity) for quantity in requests[number].quantities]]
                    known = min(result.shape[1], scores.shape[1])  # all but the first position of a sequence
                    result[:, result.shape[1] - known :] = scores[:, scores.shape[1] - known :]
                    self.computed_tokens += len(requests[number].input_ids)
                    running.remove(output.request_id)
        except BaseException:
            self.engine.abort_request(list(running))  # the engine may be asked again
            raise
        return results


def pooling_params(request: Request) -> Any:
    """What `scoring.engines.vllm_scorer` is asked for."""
    from vllm import PoolingParams

    options = {"first_scored": max(1, request.first_scored), "entropy": "entropy" in request.quantities}
    return PoolingParams(task="token_classify", extra_kwargs=options)


def pooled_scores(output: Any) -> np.ndarray:
    """What `scoring.engines.vllm_scorer` returned, float32 [1 or 2, tokens]."""
    return output.outputs.data.numpy()


def sampling_params(request: Request) -> Any:
    """A request for the log-probabilities of a prompt; entropies cannot be had this way."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)


def prompt_losses(output: Any) -> np.ndarray:
    """Losses of all tokens of a prompt but the first, float32 [1, tokens - 1]."""
    # One entry for each token from the second on: with no top tokens asked for, only the token's own.
    return np.negative(output.prompt_logprobs.logprobs, dtype=np.float32)[None]


def engine_arguments(model: Path, config: EngineConfig) -> dict[str, Any]:
    """Arguments of `EngineArgs` for a model that only ever reads prompts."""
    # As many as fill a batch with short sequences. Each may hold a block of the cache, which is large on a CPU.
    sequences, block_tokens = (512, 16) if config.on_gpu else (128, 128)
    batch_tokens = config.engine_args.get("max_num_batched_tokens", config.batch_tokens)
    sequences = config.engine_args.get("max_num_seqs", min(sequences, batch_tokens))
    pooler = config.method == "pooler"
    # Room for the token that `generate` wants to add; versions before 0.32 wait for it even where nothing is generated.
    # Not more: the length decides which of their two position embeddings some models use.
    waits = tuple(map(int, engine_version("vllm").split(".")[:2])) < (0, 32)
    room = 0 if pooler and not waits else 1
    arguments = {
        "model": str(model),
        "runner": "pooling" if pooler else "generate",
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": config.max_length + room,
        "max_num_batched_tokens": batch_tokens,
        "max_num_seqs": sequences,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
        **config.engine_args,
        "hf_overrides": head_overrides(model, config) | config.engine_args.get("hf_overrides", {}),
    }
    if not MEMORY_ARGS & config.engine_args.keys():
        # Two batches, the longest sequence, a block for every sequence and one for vLLM are never short. More is of no
        # use to sequences that are read once, would be in the way of further engines, and takes a CPU long to touch.
        tokens = 2 * batch_tokens + config.max_length + (sequences + 1) * block_tokens
        states = STATE_BYTES if is_recurrent(AutoConfig.from_pretrained(model)) else 0
        arguments["kv_cache_memory_bytes"] = states + tokens * cache_token_bytes(arguments)
        if config.on_gpu:
            arguments["gpu_memory_utilization"] = 0.01  # only checked against what is free at the start
    return arguments


def head_overrides(model: Path, config: EngineConfig) -> dict[str, str]:
    """How vLLM is told to compute logits in float32. Quantised heads cannot; before 0.32, only pooling models can."""
    if config.method == "pooler":
        return {"head_dtype": "model"}  # the scorer brings its own head
    quantised = getattr(AutoConfig.from_pretrained(model), "quantization_config", None)
    return {} if quantised else {"head_dtype": "float32"}


def cache_token_bytes(arguments: dict[str, Any]) -> int:
    """Bytes of key-value cache that a token takes in each process of an engine with these arguments, by vLLM's account.

    States of recurrent layers are not counted, and windows of attention count in full.
    """
    from vllm import EngineArgs
    from vllm.config import ParallelConfig

    config = EngineArgs(**arguments).create_model_config()
    heads = max(1, config.get_total_num_kv_heads() // arguments["tensor_parallel_size"])
    vectors = 1 if config.use_mla else 2 * heads
    return vectors * config.get_num_layers(ParallelConfig()) * config.get_head_size() * config.dtype.itemsize
