"""Token scores by vLLM.

The method `pooler` computes them inside the engine (see `scoring.engines.vllm_scorer`). The method `prompt_logprobs`
uses only vLLM's public API: the prompt log-probabilities of a request that generates one token.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.scoring.engines.architectures import architectures
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.engines.vllm_arguments import engine_arguments, engine_config
from weighted_mtp.scoring.engines.vllm_plugin import SCORE_TOKENS, register

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker process is the engine
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token beyond the model's limit is reserved but never computed
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise tensor parallelism needs a NUMA node per process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm_|vllm_dist_)\S+$", re.MULTILINE)
"""Python's and vLLM's names of shared memory, as in /proc/PID/maps."""
RETURNED_QUANTITIES: tuple[Quantity, ...] = ("loss", "entropy")
"""Rows of a vLLM result, in this order; entropies only if requested."""


class VllmEngine:
    """An engine on `vllm.LLMEngine`, inside the calling process."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint and reserve memory for its key-value cache."""
        for variable, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        import torch

        torch.set_num_threads(config.threads)
        if config.dtype == "bfloat16" and not config.on_gpu:
            request_amx()
        from vllm import EngineArgs, LLMEngine

        hf_config = engine_config(model, config)
        if config.method == "pooler":
            os.environ[SCORE_TOKENS] = ",".join(architectures(hf_config))
            register()  # vLLM calls plugins only once per process; this may not be its first engine
            self.make_params, self.read = pooling_params, pooled_scores
        else:
            self.make_params, self.read = sampling_params, prompt_losses
        self.engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(model, config)))
        own_code = getattr(hf_config, "auto_map", None) or {}
        if "AutoModelForCausalLM" in own_code and self.engine.model_config.using_transformers_backend():
            raise ValueError("vLLM would not run the code of its output layer")
        if config.tensor_parallel_size > 1:
            unlink_shared_memory()
        self.computed_tokens = 0
        self.max_in_flight = 2 * self.engine.vllm_config.scheduler_config.max_num_seqs

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        from vllm.inputs import tokens_input

        results = [request.missing() for request in requests]
        waiting = [number for number, request in enumerate(requests) if len(request.input_ids) > 1]
        waiting.reverse()
        running: set[str] = set()
        try:
            while waiting or running:
                # Enough requests for the scheduler to choose from, few enough to limit token ids held as Python lists.
                while waiting and len(running) < self.max_in_flight:
                    request = requests[waiting[-1]]
                    prompt = tokens_input(request.input_ids.tolist())
                    self.engine.add_request(str(waiting[-1]), prompt, self.make_params(request))
                    running.add(str(waiting.pop()))
                for output in self.engine.step():
                    scores = self.read(output)
                    number = int(output.request_id)
                    result = results[number]
                    scores = scores[[RETURNED_QUANTITIES.index(name) for name in requests[number].quantities]]
                    known = min(result.shape[1], scores.shape[1])  # all but the first position of a sequence
                    result[:, result.shape[1] - known :] = scores[:, scores.shape[1] - known :]
                    self.computed_tokens += len(requests[number].input_ids)
                    running.remove(output.request_id)
        except BaseException:
            self.engine.abort_request(list(running))  # the engine may be used again
            raise
        return results


def unlink_shared_memory() -> None:
    """Remove the names of the memory that this process and vLLM's processes share. All of them have opened it.

    Linux then frees it with the last of them, also if they are killed. They would leave it behind otherwise.
    """
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        for path in SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text()):
            Path(path).unlink(missing_ok=True)


def request_amx() -> None:
    """Ask Linux to let this process use AMX, if the CPU has it.

    vLLM's attention uses AMX without asking; it works only if another library has asked before.

    Raises:
        UserError: Linux refuses.
    """
    import torch

    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise UserError(
            "--dtype bfloat16: Linux does not let this process use AMX, which vLLM needs for it on this CPU; "
            "use --dtype float32 or --engine transformers"
        )


def pooling_params(request: Request) -> Any:
    """VLLM parameters of a request for `scoring.engines.vllm_scorer`."""
    from vllm import PoolingParams

    options = {"first_scored": max(1, request.first_scored), "entropy": "entropy" in request.quantities}
    return PoolingParams(task="token_classify", extra_kwargs=options)


def pooled_scores(output: Any) -> np.ndarray:
    """Result of `scoring.engines.vllm_scorer`, float32 [1 or 2, tokens]."""
    return output.outputs.data.numpy()


def sampling_params(request: Request) -> Any:
    """VLLM parameters of a request for the log-probabilities of a prompt. Entropies are not available."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)


def prompt_losses(output: Any) -> np.ndarray:
    """Losses of all tokens of a prompt except the first, float32 [1, tokens - 1]."""
    # Without top tokens there is one entry per token, from the second token on.
    return np.negative(output.prompt_logprobs.logprobs, dtype=np.float32)[None]
