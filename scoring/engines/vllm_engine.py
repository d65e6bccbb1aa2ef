"""Token losses by vLLM, through its public API: prompt log-probabilities of a request that generates one token."""

import os
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from scoring.engines import EngineConfig

GPU_MEMORY = 0.85
"""Part of a GPU that vLLM plans with; the logits of prompt log-probabilities come on top."""
MAX_SEQUENCES = 128
CPU_BLOCK_TOKENS = 128
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker process is the engine
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the generated token's place; no forward pass ever computes it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """An engine on `vllm.LLM`, inside the calling process."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint and reserve memory for its key-value cache."""
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        import torch

        torch.set_num_threads(config.threads)
        from vllm import LLM, SamplingParams

        memory = (
            {"gpu_memory_utilization": GPU_MEMORY * config.gpu_share / config.models}
            if config.gpu_share
            else {"kv_cache_memory_bytes": cache_bytes(model, config)}
        )
        self.llm = LLM(
            model=str(model),
            dtype=config.dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=config.max_length + 1,
            max_num_batched_tokens=config.batch_tokens,
            max_num_seqs=min(MAX_SEQUENCES, config.batch_tokens),
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **memory,
        )
        self.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)

    def token_losses(self, sequences: list[np.ndarray], first_scored: list[int]) -> list[np.ndarray]:
        """See `Engine.token_losses`."""
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in sequences if len(ids) > 1]
        outputs = iter(self.llm.generate(prompts, self.sampling, use_tqdm=False)) if prompts else iter(())
        losses = []
        for ids, first in zip(sequences, first_scored, strict=True):
            of_sequence = np.full(len(ids), np.nan, dtype=np.float32)
            if len(ids) > 1:
                # One entry for each token from the second on: with no top tokens asked for, only the token's own.
                of_sequence[1:] = np.negative(next(outputs).prompt_logprobs.logprobs)
            losses.append(of_sequence[first:])
        return losses


def cache_bytes(model: Path, config: EngineConfig) -> int:
    """Key-value cache that is never short on a CPU: two full batches, the longest sequence, a block for every sequence.

    It is kept small because vLLM touches all of it at the start, at about a second for 400 MB.
    """
    text_config = AutoConfig.from_pretrained(model).get_text_config()
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    key_value_heads = getattr(text_config, "num_key_value_heads", None) or heads
    token_bytes = 2 * text_config.num_hidden_layers * key_value_heads * head_dim * DTYPE_BYTES[config.dtype]
    return token_bytes * (2 * config.batch_tokens + config.max_length + MAX_SEQUENCES * CPU_BLOCK_TOKENS)
