"""A small scored shard set and tiny models of several architectures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from schemas.fingerprints import tokenizer_fingerprint
from schemas.manifest import Column, Condition, CorpusInfo, Manifest, TokenizerInfo
from schemas.shard_set import ShardSet, finish_shard_set
from schemas.shards import list_column, shard_name, write_shard
from schemas.value_counts import ValueCounts

SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **SPECIAL),
    "qwen2-tied": Qwen2Config(**SIZES, **SPECIAL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, **SPECIAL, head_dim=16, final_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=258, n_embd=32, n_layer=3, n_head=2, n_positions=128, resid_pdrop=0, embd_pdrop=0,
                       attn_pdrop=0, **SPECIAL),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **SPECIAL),
}  # fmt: skip


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
def scored_set(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., ShardSet]:
    """`scored_set(lengths)` writes sequences of random bytes whose scores are a function of the token.

    Column `excess_loss` and `long_short` hold `(id - 128) / 64`, NaN at every position 0.
    """

    def build(lengths: list[int], name: str = "set", shards: int = 2, seed: int = 0) -> ShardSet:
        path = tmp_path / name
        path.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.save_pretrained(path / "tokenizer")
        rng = np.random.default_rng(seed)
        counts = ValueCounts()
        entries = []
        for i, part in enumerate(np.array_split(np.asarray(lengths), shards)):
            ids = rng.integers(0, 256, part.sum()).astype(np.int32)
            scores = ((ids - 128) / 64).astype(np.float16)
            scores[np.cumsum(part) - part] = np.nan
            counts.add(scores)
            scores_column = list_column(scores, part)
            table = pa.table(
                {
                    "document_id": [f"{i}-{j}" for j in range(len(part))],
                    "start": np.zeros(len(part), dtype=np.int64),
                    "input_ids": list_column(ids, part),
                    "excess_loss": scores_column,
                    "long_short": scores_column,
                }
            )
            entries.append(write_shard(path / shard_name(i, shards), table))
        condition = Condition(model="m", fingerprint="f", dtype="float32", engine="none", engine_version="0")
        column = Column(origin=condition, statistics=counts.statistics())
        manifest = Manifest(
            corpus=CorpusInfo(input="test", text_field="text", max_length=max(lengths), adds_bos=False, adds_eos=False,
                              documents=len(lengths), rejects=0),
            tokenizer=TokenizerInfo(name="bytes", fingerprint=tokenizer_fingerprint(tokenizer), vocab_size=258,
                                    bos_token_id=256, eos_token_id=257),
            columns={"excess_loss": column, "long_short": column},
            shards=entries,
            request=name,
        )  # fmt: skip
        return finish_shard_set(path, manifest, {"excess_loss": counts, "long_short": counts})

    return build
