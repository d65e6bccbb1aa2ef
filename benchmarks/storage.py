"""Size of a score on disk: bytes per token and column of the shard format, compared with plain Parquet.

    .venv/bin/python benchmarks/storage.py [--tokens 300000]
    .venv/bin/python benchmarks/storage.py --model smollm2-135m --tokens 40000
    .venv/bin/python benchmarks/storage.py --set SCORED_SET

By default the scores are token losses of a toy in float32: a small Llama is trained on the Python standard library and
scores it halfway and at the end. The second command takes the losses of a real model, which must be installed (see
`support.smollm2`), on Python's documentation, with up to 2,048 and up to 128 tokens of context. A set has only rounded
values, so its rows for unrounded float32 are those of rounded values. The last row is the entropy of the rounded
values, a lower bound for any code that treats tokens independently.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from support import smollm2
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from weighted_mtp.data.python_library import documentation, sources
from weighted_mtp.schemas.shard_set.rounding import round_nats
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import (
    TOKEN_FIELDS,
    ZSTD_LEVEL,
    flat_values,
    list_column,
    list_lengths,
    write_shard,
)

CONTEXT, SHORT = 2048, 128
VOCABULARY = 2048
LENGTH = 256
BATCH = 16
STEPS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scores = parser.add_mutually_exclusive_group()
    scores.add_argument("--set", type=Path, help="scored shard set; default: compute scores")
    scores.add_argument("--model", choices=["smollm2-135m"], help="real model to compute scores; default: a toy")
    parser.add_argument("--tokens", type=int, default=300_000, help="number of tokens")
    arguments = parser.parse_args()
    if arguments.set:
        report(table_of_set(arguments.set, arguments.tokens))
    else:
        report(real_table(arguments.tokens) if arguments.model else toy_table(arguments.tokens))


def table_of_set(path: Path, tokens: int) -> pa.Table:
    """Enough of the first shards of a set for `tokens` tokens."""
    shard_set = ShardSet.open(path)
    if not shard_set.manifest.columns:
        raise SystemExit(f"{path}: no score columns; add some with 'wmtp score'")
    tables, held = [], 0
    for index, shard in enumerate(shard_set.manifest.shards):
        if held >= tokens:
            break
        tables.append(shard_set.read(index))
        held += shard.tokens
    return pa.concat_tables(tables).combine_chunks()


def toy_table(tokens: int) -> pa.Table:
    """Token losses of a small Llama and their improvement over the second half of its training, float32."""
    texts = [text for _, text in [*documentation(), *list(sources())[::3]]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCABULARY, show_progress=False)
    ids = np.concatenate([encoding.ids for encoding in tokenizer.encode_batch(texts)]).astype(np.int32)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    torch.manual_seed(0)
    rows = rows[torch.randperm(len(rows)).numpy()]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    scored = rows[: tokens // LENGTH]
    halfway, final = (token_losses(model, scored) for _ in train_in_two_halves(model, rows))
    return scored_table(list(scored), {"loss_reference": final, "excess_loss": halfway - final})


def real_table(tokens: int) -> pa.Table:
    """Token losses of SmolLM2-135M with a long and a short context, and their difference, float32."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = smollm2.write_checkpoint(Path(directory))
        model = LlamaForCausalLM.from_pretrained(directory).eval()
    rows: list[np.ndarray] = []
    for row in smollm2.real_rows(tokenizer, smollm2.MOST_ROWS, CONTEXT):
        rows += [row] * (sum(map(len, rows)) < tokens)
    full = np.concatenate([token_losses(model, row[None]) for row in rows])
    short = np.concatenate(
        [token_losses(model, row[None, start : start + SHORT]) for row in rows for start in range(0, len(row), SHORT)]
    )
    return scored_table(rows, {"loss_reference": full, "loss_short": short, "long_short": short - full})


def scored_table(rows: list[np.ndarray], scores: dict[str, np.ndarray]) -> pa.Table:
    """A table like a shard: rows of token ids, and float32 scores [tokens of all rows]."""
    lengths = np.array([len(row) for row in rows])
    columns = {
        "document_id": pa.array([f"row-{row}" for row in range(len(rows))]),
        "start": pa.array(np.zeros(len(rows), np.int64)),
        "input_ids": list_column(np.concatenate(rows), lengths),
    }
    return pa.table(columns | {name: list_column(values, lengths) for name, values in scores.items()})


def train_in_two_halves(model: LlamaForCausalLM, rows: np.ndarray) -> Iterator[None]:
    """Train for `STEPS` steps; yield halfway and at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, STEPS + 1):
        first = step * BATCH % (len(rows) - BATCH)
        batch = torch.from_numpy(rows[first : first + BATCH]).long()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (STEPS // 2, STEPS):
            yield


@torch.inference_mode()
def token_losses(model: LlamaForCausalLM, rows: np.ndarray) -> np.ndarray:
    """Loss of every token in nats, rows concatenated, float32 [tokens]; NaN at the start of each row."""
    losses = np.full(rows.shape, np.nan, np.float32)
    for first in range(0, len(rows), BATCH):
        batch = torch.from_numpy(rows[first : first + BATCH]).long()
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses[first : first + BATCH, 1:] = loss.numpy()
    return losses.ravel()


def with_scores(table: pa.Table, convert: Callable[[np.ndarray], np.ndarray]) -> pa.Table:
    """A copy of the table with converted scores."""
    scores = table.column_names[len(TOKEN_FIELDS) :]
    lengths = list_lengths(table["input_ids"])
    columns = [list_column(convert(flat_values(table[name]).astype(np.float32)), lengths) for name in scores]
    return pa.table([*(table[field.name] for field in TOKEN_FIELDS), *columns], names=table.column_names)


def bits_of_entropy(values: np.ndarray) -> float:
    """Entropy of the distribution of float16 values, in bits per value."""
    counts = np.bincount(values.view(np.uint16))
    shares = counts[counts > 0] / len(values)
    return float(-(shares * np.log2(shares)).sum())


def report(table: pa.Table) -> None:
    """Write and read the table in each format, and print sizes and speeds."""
    names = table.column_names[len(TOKEN_FIELDS) :]
    tokens = len(flat_values(table["input_ids"]))
    exact = with_scores(table, lambda scores: scores)
    float16 = with_scores(table, lambda scores: scores.astype(np.float16))
    rounded = with_scores(table, round_nats)
    stored = with_scores(table, lambda scores: round_nats(scores).astype(np.float32))
    zstd = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    split = zstd | {"use_byte_stream_split": [f"{name}.list.element" for name in ("input_ids", *names)]}
    formats: dict[str, Callable[[Path], object]] = {
        "float32, pyarrow's defaults (dictionary, snappy)": lambda path: pq.write_table(exact, path),
        "float32, zstd": lambda path: pq.write_table(exact, path, **zstd),
        "float32, BYTE_STREAM_SPLIT, zstd": lambda path: pq.write_table(exact, path, **split),
        "float16, pyarrow's defaults (dictionary, snappy)": lambda path: pq.write_table(float16, path),
        "float16, zstd": lambda path: pq.write_table(float16, path, **zstd),
        "float16, BYTE_STREAM_SPLIT, zstd": lambda path: pq.write_table(float16, path, **split),
        "float16 in steps of 1/512, BYTE_STREAM_SPLIT, zstd": lambda path: pq.write_table(rounded, path, **split),
    }
    for level in (3, 6, 9, 15):
        formats[f"as in a shard, zstd level {level}"] = partial(
            pq.write_table, stored, compression_level=level, **split
        )
    formats[f"shard: float32 in steps of 1/512, zstd level {ZSTD_LEVEL}"] = lambda path: write_shard(path, rounded)
    bound = float(np.mean([bits_of_entropy(flat_values(rounded[name])) for name in names])) / 8
    title = f"{tokens:,} tokens, columns {', '.join(names)}"
    result = Table("format", "bytes per token and column", "of the shard", "of the bound", title=title)
    result.add_column("write Mtok/s", justify="right")
    result.add_column("read Mtok/s", justify="right")
    with tempfile.TemporaryDirectory() as directory:
        measured = {name: measure(Path(directory) / "x", write, names, tokens) for name, write in formats.items()}
    shard = list(measured.values())[-1][0]
    for name, (size, write_rate, read_rate) in measured.items():
        result.add_row(
            name, f"{size:.3f}", f"{size / shard:.2f}", f"{size / bound:.2f}", f"{write_rate:.0f}", f"{read_rate:.0f}"
        )
    result.add_row("entropy bound of the shard", f"{bound:.3f}", f"{bound / shard:.2f}", "1.00", "", "")
    result.caption = "write: all columns; read: the score columns, one thread, file in memory"
    Console(width=130).print(result)


def measure(path: Path, write: Callable[[Path], object], names: list[str], tokens: int) -> tuple[float, float, float]:
    """Bytes per token and score column, and write and read throughput in millions of tokens per second."""
    start = time.perf_counter()
    write(path)
    written = time.perf_counter()
    pq.read_table(path, columns=names, use_threads=False)
    read = time.perf_counter()
    metadata = pq.read_metadata(path)
    size = 0
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        size += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)
    return size / tokens / len(names), tokens / (written - start) / 1e6, tokens / (read - written) / 1e6


if __name__ == "__main__":
    main()
