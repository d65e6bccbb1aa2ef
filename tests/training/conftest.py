"""A small scored shard set and tiny models of several architectures."""

import math
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comparing import LENGTHS, free_port
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "rope_theta": 10.0}
SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **SPECIAL),
    "llama-wide": LlamaConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 160}, **SPECIAL),
    "llama-tied": LlamaConfig(**SIZES, **SPECIAL, tie_word_embeddings=True),
    "qwen2-tied": Qwen2Config(**SIZES, **SPECIAL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, **SPECIAL, head_dim=16, final_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=258, n_embd=32, n_layer=3, n_head=2, n_positions=128, resid_pdrop=0, embd_pdrop=0,
                       attn_pdrop=0, **SPECIAL),
    "gpt2-dropout": GPT2Config(vocab_size=258, n_embd=32, n_layer=3, n_head=2, n_positions=128, **SPECIAL),
    "phi3": Phi3Config(**SIZES, **SPECIAL, original_max_position_embeddings=12, rope_parameters=LONGROPE),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **SPECIAL),
}  # fmt: skip


RANK = """
import os, traceback
import torch
from weighted_mtp.schemas.storage import locks
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.run.directory import RunDirectory
from weighted_mtp.training.run.train import train
torch.set_num_threads(1)
if "adamw8bit" in config: torch.compiler.set_stance("force_eager")  # compiling its steps takes a minute
locks.RENEWAL_SECONDS = 0.3
save = RunDirectory.save_checkpoint
def save_and_stop(self, accelerator, state, step):
    save(self, accelerator, state, step)
    if step == stop_at: os._exit(0)
RunDirectory.save_checkpoint = save_and_stop
try:
    train(TrainConfig.model_validate_json(config))
except BaseException:
    with open(failure, "w") as file:
        traceback.print_exc(file=file)
"""


@pytest.fixture
def launch(start_process: Callable[..., BaseProcess], tmp_path: Path) -> Callable[..., None]:
    """`launch(config, processes, stop_at=None, **variables)` trains in several gloo processes.

    With `stop_at` they end after the checkpoint of that step. `variables` are added to the environment.
    """

    def run(config: TrainConfig, processes: int, stop_at: int | None = None, **variables: str) -> None:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        failures = [tmp_path / f"failure-{rank}" for rank in range(processes)]
        ranks = [
            start_process(
                RANK,
                environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | variables,
                config=config.model_dump_json(),
                stop_at=stop_at,
                failure=str(failures[rank]),
            )
            for rank in range(processes)
        ]
        for process in ranks:
            process.join()
        for failure in failures:
            assert not failure.exists(), failure.read_text()
        assert [process.exitcode for process in ranks] == [0] * processes

    return run


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """`model_dir("llama", seed=0)` writes a checkpoint with random weights large enough to matter, and a tokenizer."""

    def build(name: str = "llama", seed: int = 0) -> Path:
        path = tmp_path / f"{name}-{seed}"
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(path)
        return path

    return build


@pytest.fixture
def scored_set(make_shard_set: Callable[..., ShardSet]) -> Callable[..., ShardSet]:
    """`scored_set(lengths)` writes sequences of random bytes whose scores are a function of the token.

    Columns `excess_loss` and `long_short` hold `(id - 128) / 64`, NaN at every position 0; -1 in all sequences after
    the first `silent_after`.
    """

    def build(
        lengths: list[int], name: str = "set", shards: int = 2, seed: int = 0, silent_after: int | None = None
    ) -> ShardSet:
        rng = np.random.default_rng(seed)
        sequences = [rng.integers(0, 256, length).tolist() for length in lengths]
        scores = [[math.nan] + [(token - 128) / 64 for token in sequence[1:]] for sequence in sequences]
        if silent_after is not None:
            scores[silent_after:] = [[math.nan] + [-1.0] * (length - 1) for length in lengths[silent_after:]]
        rows_per_shard = -(-len(lengths) // shards)
        return make_shard_set(sequences, {"excess_loss": scores, "long_short": scores}, name, rows_per_shard)

    return build


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of a short run of a Llama on 36 sequences."""
    model = model_dir()
    shards = scored_set(LENGTHS)
    held_out = scored_set(LENGTHS[:6], name="held-out", seed=1)
    defaults: dict[str, Any] = {
        "input": shards.path,
        "model": str(model),
        "eval_input": held_out.path,
        "weights": {"preset": "dense", "lam": 0.25},
        "heads": {"offsets": (1, 2)},
        "optimizer": {"learning_rate": 1e-2},
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 6,
        "checkpoint_every": 100,
        "log_every": 3,
    }
    return lambda name, **changes: TrainConfig(**(defaults | {"output": tmp_path / name} | changes))


@pytest.fixture
def add_column(make_shard_set: Callable[..., ShardSet]) -> Callable[..., ShardSet]:
    """`add_column(shards, name)` writes a set of the same rows with one column: `excess_loss` with the other sign.

    With `keep` it holds `excess_loss` itself, too.
    """

    def add(shards: ShardSet, name: str, column: str = "loss_b", keep: bool = False) -> ShardSet:
        rows = [row for shard in range(len(shards.manifest.shards)) for row in shards.read(shard).to_pylist()]
        columns = {"excess_loss": [row["excess_loss"] for row in rows]} if keep else {}
        columns[column] = [[-score for score in row["excess_loss"]] for row in rows]
        return make_shard_set([row["input_ids"] for row in rows], columns, name, shards.manifest.shards[0].rows)

    return add


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the life of a process; let every test choose its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
