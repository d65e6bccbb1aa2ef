"""Token losses by vLLM.

The method `pooler` computes them inside the engine (see `scoring.engines.vllm_scorer`). The method `prompt_logprobs`
uses nothing but vLLM's public API: prompt log-probabilities of a request that generates one token.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from scoring.engines import EngineConfig, Request, is_recurrent
from scoring.engines.vllm_plugin import SCORE_TOKENS, register

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker process is the engine
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token more than the model reads is planned for, and never computed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else tensor parallel wants a NUMA node for each process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}


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
            os.environ[SCORE_TOKENS] = ",".join(AutoConfig.from_pretrained(model).architectures)
            register()  # vLLM itself calls plugins once, and this may not be the first engine of the process
            method = {"runner": "pooling", "hf_overrides": {"head_dtype": "model"}}  # the scorer brings its own head
            self.make_params, self.read = pooling_params, pooled_scores
        else:
            method = {"runner": "generate"}
            self.make_params, self.read = sampling_params, prompt_losses
        arguments = {**method, **engine_arguments(model, config), **config.engine_args}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.in_flight = 2 * self.engine.vllm_config.scheduler_config.max_num_seqs

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        from vllm.inputs import tokens_input

        results = [request.missing() for request in requests]
        waiting = [number for number, request in enumerate(requests) if len(request.input_ids) > 1]
        waiting.reverse()
        running = 0
        while waiting or running:
            # The scheduler always has enough to choose from, and ids exist as Python lists only for so long.
            while waiting and running < self.in_flight:
                request = requests[waiting[-1]]
                prompt = tokens_input(request.input_ids.tolist())
                self.engine.add_request(str(waiting.pop()), prompt, self.make_params(request))
                running += 1
            for output in self.engine.step():
                scores = self.read(output)
                result = results[int(output.request_id)]
                known = min(result.shape[1], scores.shape[1])  # all but the first position of a sequence
                result[:, result.shape[1] - known :] = scores[:, scores.shape[1] - known :]
                running -= 1
        return results


def pooling_params(request: Request) -> Any:
    """What `scoring.engines.vllm_scorer` is asked for."""
    from vllm import PoolingParams

    options = {"first_scored": max(1, request.first_scored), "entropy": request.entropy}
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
    sequences = min(sequences, config.batch_tokens)
    arguments = {
        "model": str(model),
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": config.max_length + 1,
        "max_num_batched_tokens": config.batch_tokens,
        "max_num_seqs": sequences,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
    }
    if not MEMORY_ARGS & config.engine_args.keys() and not is_recurrent(AutoConfig.from_pretrained(model)):
        # Two batches, the longest sequence, and a block for every sequence are never short. More is of no use to
        # sequences that are read once, would stand in the way of further engines, and takes a CPU long to touch.
        tokens = 2 * config.batch_tokens + config.max_length + sequences * block_tokens
        arguments["kv_cache_memory_bytes"] = tokens * cache_token_bytes(model, config)
        if config.on_gpu:
            arguments["gpu_memory_utilization"] = 0.01  # only checked against what is free at the start
    return arguments


def cache_token_bytes(model: Path, config: EngineConfig) -> int:
    """Bytes of key-value cache that one token takes, in each of the processes that share the model."""
    text_config = AutoConfig.from_pretrained(model).get_text_config()
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    key_value_heads = getattr(text_config, "num_key_value_heads", None) or heads
    return 2 * text_config.num_hidden_layers * key_value_heads * head_dim * DTYPE_BYTES[config.dtype]
