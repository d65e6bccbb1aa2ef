"""Arguments of a vLLM engine: checks of the user's arguments, and those derived from the job."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import load_config
from weighted_mtp.scoring.engines.architectures import is_recurrent
from weighted_mtp.scoring.engines.base import EngineConfig
from weighted_mtp.scoring.engines.choice import engine_version

RESERVED_ARGS = {
    "model": "use --reference, --base and --conditions",
    "revision": "write --reference ID@REVISION",
    "dtype": "use --dtype",
    "tensor_parallel_size": "use --tensor_parallel_size",
    "pipeline_parallel_size": "use --tensor_parallel_size",
    "data_parallel_size": "use --workers",
    "runner": "use --engine_method",
    "convert": "use --engine_method",
    "max_model_len": "it depends on the corpus",
    "trust_remote_code": "use --trust_remote_code",
    "enable_prefix_caching": "cached tokens would have no losses",
    "logprobs_mode": "losses need the default",
    "pooler_config": "scoring has its own pooler",
}
"""vLLM arguments that users cannot set, and the alternative or reason for each."""
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
"""vLLM arguments that change its speed but not its results. They are not part of a condition."""
MEMORY_ARGS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
RECURRENT_STATE_BYTES = 1 << 30
"""Memory for the states of recurrent layers. `--engine_args.kv_cache_memory_bytes` sets more."""


def check_engine_args(arguments: Mapping[str, Any]) -> None:
    """Raise UserError unless vLLM has all these arguments and none of them is reserved."""
    if not arguments:
        return
    if arguments.get("load_format") == "dummy":
        raise UserError("--engine_args.load_format dummy: would score with random weights; leave it out")
    from vllm import EngineArgs

    known = {argument.name for argument in fields(EngineArgs)}
    for name in arguments:
        if name in RESERVED_ARGS:
            raise UserError(f"--engine_args.{name}: is set by wmtp; {RESERVED_ARGS[name]}")
        if name not in known:
            similar = get_close_matches(name, known - RESERVED_ARGS.keys(), n=1)
            meant = f"; did you mean {similar[0]}?" if similar else "; see vLLM's documentation of its engine arguments"
            raise UserError(f"--engine_args.{name}: vLLM {engine_version('vllm')} has no such argument{meant}")


def engine_arguments(model: Path, config: EngineConfig) -> dict[str, Any]:
    """Arguments of `EngineArgs` for a model that only reads prompts."""
    # Enough short sequences to fill a batch. Each may hold a cache block, and blocks are large on a CPU.
    sequences, block_tokens = (512, 16) if config.on_gpu else (128, 128)
    batch_tokens = config.engine_args.get("max_num_batched_tokens", config.batch_tokens)
    sequences = config.engine_args.get("max_num_seqs", min(sequences, batch_tokens))
    pooler = config.method == "pooler"
    # `generate` needs room for one new token; before 0.32, pooling does, too.
    # Add no more: some models select between two position embeddings by this length.
    pooling_needs_room = tuple(map(int, engine_version("vllm").split(".")[:2])) < (0, 32)
    room = 0 if pooler and not pooling_needs_room else 1
    arguments = {
        "model": str(model),
        "runner": "pooling" if pooler else "generate",
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "trust_remote_code": config.trust_remote_code,
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
        # Two batches, the longest sequence, one block per sequence and one for vLLM always suffice. A larger cache does
        # not help sequences that are read once, takes memory from other engines, and is slow to allocate on a CPU.
        tokens = 2 * batch_tokens + config.max_length + (sequences + 1) * block_tokens
        states = RECURRENT_STATE_BYTES if is_recurrent(engine_config(model, config)) else 0
        arguments["kv_cache_memory_bytes"] = states + tokens * cache_token_bytes(arguments)
        if config.on_gpu:
            arguments["gpu_memory_utilization"] = 0.01  # vLLM only compares it with the free memory at the start
    return arguments


def head_overrides(model: Path, config: EngineConfig) -> dict[str, str]:
    """Config overrides for float32 logits in vLLM.

    Quantised heads do not support them. Before 0.32, only pooling models do.
    """
    if config.method == "pooler":
        return {"head_dtype": "model"}  # the scorer has its own float32 head
    quantised = getattr(engine_config(model, config), "quantization_config", None)
    return {} if quantised else {"head_dtype": "float32"}


def engine_config(model: Path, config: EngineConfig) -> Any:
    """The Hugging Face config of a checkpoint."""
    return load_config(str(model), model, trust_remote_code=config.trust_remote_code)


def cache_token_bytes(arguments: dict[str, Any]) -> int:
    """Key-value cache per token in each process of an engine with these arguments, in bytes, as vLLM counts it.

    Recurrent states are not counted. Sliding-window attention counts as full attention.
    """
    from vllm import EngineArgs
    from vllm.config import ParallelConfig

    config = EngineArgs(**arguments).create_model_config()
    heads = max(1, config.get_total_num_kv_heads() // arguments["tensor_parallel_size"])
    vectors = 1 if config.use_mla else 2 * heads
    return vectors * config.get_num_layers(ParallelConfig()) * config.get_head_size() * config.dtype.itemsize
