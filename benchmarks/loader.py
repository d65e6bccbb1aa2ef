"""Throughput of the training loader in tokens per CPU second, and the time a training step waits for it.

    .venv/bin/python benchmarks/loader.py [--set SCORED_SET] [--rounds 5] [--steps 150]

First, the code of `wmtp train` trains a very small Llama on all cores, to measure how long each step waits for its
rows. Then several readers read the ids and one score column of the same shards, with one thread on one core: this
project's loader (row groups in random order, weights, packing, shuffled rows), `datasets` streaming the sequences as
torch tensors and as Python lists, and pyarrow reading only the row groups. The readers take turns; results are medians
over the rounds. Without --set, the shards contain the Python standard library's text, repeated, with synthetic scores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from weighted_mtp.data.python_library import documentation, sources
from weighted_mtp.schemas.configs import TrainConfig, WeightsConfig
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest, tokenizer_fingerprint
from weighted_mtp.schemas.shard_set.manifest import Contrast, CorpusInfo, Manifest, ScoreColumn, TokenizerInfo
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import list_column, shard_name, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER
from weighted_mtp.training.data.held_out import HeldOutRows
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.data.packing import split_long
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting import make_weighting

VOCABULARY = 4096
LENGTH = 2048
BATCH = 32
COLUMN = "excess_loss"
SLOWEST = "datasets streaming, torch"
RESULT = "waiting.json"
STEP = {"sequence_length": 512, "batch_size": 16, "micro_batch_size": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, help=f"scored shard set with {COLUMN}; default: generate one")
    parser.add_argument("--tokens", type=int, default=1 << 23, help="tokens of the generated set")
    parser.add_argument("--rounds", type=int, default=5, help="number of times each reader reads the set")
    parser.add_argument("--steps", type=int, default=150, help="training steps; a block of the loader lasts 128 steps")
    parser.add_argument("--json", type=Path, help="output file for the settings and rows")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    console = Console(width=130)
    if arguments.train:
        row = waiting(ShardSet.open(arguments.set), arguments.train, arguments.steps)
        console.print(waiting_table(row))
        (arguments.train / RESULT).write_text(json.dumps(row))
        return
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as work:
        shards = ShardSet.open(arguments.set) if arguments.set else make_set(Path(work) / "set", arguments.tokens)
        cores = os.sched_getaffinity(0)
        print(f"{len(cores)} cores, load average before {os.getloadavg()[0]:.1f}, in {shards.path}", flush=True)
        # In a separate process, as with `wmtp`, whose threads are not limited to one core.
        command = [sys.executable, __file__, "--set", str(shards.path), "--train", work]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
        subprocess.run([*command, "--steps", str(arguments.steps)], env=environment, check=True)
        os.sched_setaffinity(0, {min(cores)})
        pa.set_cpu_count(1)
        torch.set_num_threads(1)
        rates = throughput(shards, arguments.rounds)
        console.print(throughput_table(rates, shards))
        console.print(packing(shards))
        rows = [json.loads((Path(work) / RESULT).read_text())]
        rows += [{"reader": name, "tokens_per_cpu_second": statistics.median(own)} for name, own in rates.items()]
        setting = {"set": f"{shards.manifest.tokens} tokens, rows of {LENGTH}, one thread", "rounds": arguments.rounds}
        if arguments.json:
            arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


def make_set(path: Path, tokens: int, names: Sequence[str] = (COLUMN,)) -> ShardSet:
    """A scored set of at least `tokens` tokens in shards of 2^22, with real texts and random contrasts."""
    texts = [text for _, text in [*documentation(), *sources()]]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts[::5], VOCABULARY, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)
    tokenizer.save_pretrained(path / TOKENIZER)
    (path / DATA).mkdir()
    encoded = [np.array(encoding.ids, np.int32) for encoding in backend.encode_batch(texts)]
    rng = np.random.default_rng(0)
    documents: list[np.ndarray] = []
    while sum(map(len, documents)) < tokens:
        documents += [encoded[index] for index in rng.permutation(len(encoded))]
    ends = np.cumsum([len(document) for document in documents])
    parts = np.split(np.arange(len(documents)), np.searchsorted(ends, np.arange(1 << 22, ends[-1], 1 << 22)))
    counts: dict[str, ValueCounts] = {name: ValueCounts() for name in names}
    entries = []
    for number, part in enumerate(parts):
        lengths = split_long(np.array([len(documents[index]) for index in part]), LENGTH)[1]
        ids = np.concatenate([documents[index] for index in part])
        columns = {
            "document_id": pa.array([f"document-{row}" for row in range(len(lengths))]),
            "start": pa.array(np.zeros(len(lengths), np.int64)),
            "input_ids": list_column(ids, lengths),
        }
        for name in names:
            scores = (np.round(rng.normal(0.1, 0.7, len(ids)) * 512) / 512).astype(np.float16)
            scores[np.cumsum(lengths) - lengths] = np.nan
            counts[name].add(scores)
            columns[name] = list_column(scores, lengths)
        entries.append(write_shard(path / DATA / shard_name(number, len(parts)), pa.table(columns)))
    contrast = Contrast(minuend="loss_base", subtrahend="loss_reference")
    manifest = Manifest(
        corpus=CorpusInfo(
            input="Python standard library",
            text_field="text",
            max_length=LENGTH,
            adds_bos=False,
            adds_eos=False,
            documents=len(documents),
            rejects=0,
        ),
        tokenizer=TokenizerInfo(
            name="bpe",
            fingerprint=tokenizer_fingerprint(tokenizer),
            files_sha256=directory_digest(path / TOKENIZER),
            vocab_size=VOCABULARY,
            bos_token_id=None,
            eos_token_id=None,
        ),
        columns={name: ScoreColumn(origin=contrast, statistics=own.statistics()) for name, own in counts.items()},
        shards=entries,
        request={"command": "benchmark"},
    )
    return finish_shard_set(path, manifest, counts)


def make_loader(shards: ShardSet, preset: str) -> RowLoader:
    """The loader, as in `wmtp train`."""
    zipped = ZippedSets((shards,))
    config = WeightsConfig(preset=preset, column=None if preset == "uniform" else COLUMN)
    return RowLoader(zipped, make_weighting(config, zipped), LENGTH)


def read_loader(shards: ShardSet, preset: str) -> int:
    """Read as many tokens from the loader as the set has."""
    tokens = 0
    for batch in make_loader(shards, preset).batches(BATCH):
        tokens += int(batch.tokens.sum())
        if tokens >= shards.manifest.tokens:
            break
    return tokens


def read_datasets(shards: ShardSet, form: str | None) -> int:
    """Read all sequences of the set one by one, in a format of `datasets`."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = [str(shards.path / DATA / shard.name) for shard in shards.manifest.shards]
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["input_ids", COLUMN])
    return sum(len(row["input_ids"]) for row in (rows.with_format(form) if form else rows))


def read_pyarrow(shards: ShardSet) -> int:
    """Read all row groups of the set as Arrow tables."""
    tokens = 0
    for shard in shards.manifest.shards:
        with pq.ParquetFile(shards.path / DATA / shard.name) as file:
            for group in range(file.num_row_groups):
                tokens += len(file.read_row_group(group, ["input_ids", COLUMN])["input_ids"].combine_chunks().flatten())
    return tokens


def throughput(shards: ShardSet, rounds: int) -> dict[str, list[float]]:
    """Tokens per CPU second of each reader and round, in turns. CPU time excludes other processes."""
    readers: dict[str, Callable[[], int]] = {
        "loader, rho1-static": lambda: read_loader(shards, "rho1-static"),
        "loader, dense": lambda: read_loader(shards, "dense"),
        "loader, sparse": lambda: read_loader(shards, "sparse"),
        "loader, uniform": lambda: read_loader(shards, "uniform"),
        "pyarrow, row groups": lambda: read_pyarrow(shards),
    }
    if find_spec("datasets"):
        readers["datasets streaming, python"] = lambda: read_datasets(shards, None)
        readers[SLOWEST] = lambda: read_datasets(shards, "torch")
    else:
        print("datasets: skipped, not installed")
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            started = time.process_time()
            tokens = read()
            rates[name].append(tokens / (time.process_time() - started))
    return rates


def throughput_table(rates: dict[str, list[float]], shards: ShardSet) -> Table:
    """The rates of each reader, and how many times faster it is than the slowest."""
    rounds = len(next(iter(rates.values())))
    title = f"{shards.manifest.tokens:,} tokens, {shards.manifest.rows:,} sequences, rows of {LENGTH}, one thread"
    table = Table("reader", title=title)
    for name in ("Mtok per CPU second", "minimum", "maximum", "times datasets, torch"):
        table.add_column(name, justify="right")
    for name, values in rates.items():
        ratios = [own / other for own, other in zip(values, rates.get(SLOWEST, ()), strict=False)]
        figures = (f"{rate / 1e6:.2f}" for rate in (statistics.median(values), min(values), max(values)))
        table.add_row(name, *figures, f"{statistics.median(ratios):.1f}" if ratios else "")
    table.caption = f"medians of {rounds} rounds; the ratio is the median of the rounds' ratios"
    return table


def packing(shards: ShardSet) -> Table:
    """Share of tokens that are not padding in one pass over the set, for several row lengths."""
    table = Table("tokens per row", "rows", "not padding", title="packing")
    for length in (512, LENGTH, 8192, 32768):
        parts = list(HeldOutRows(shards, length).batches(1024))
        rows = sum(len(part.tokens) for part in parts)
        tokens = sum(int(part.tokens.sum()) for part in parts)
        table.add_row(f"{length:,}", f"{rows:,}", f"{tokens / rows / length:.2%}")
    return table


def waiting(shards: ShardSet, work: Path, steps: int) -> dict[str, Any]:
    """Train a small model and measure the time that each step waits for its rows."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = shards.manifest.tokenizer.vocab_size
    LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes).save_pretrained(work / "model")
    waits: list[float] = []
    batches = RowLoader.batches

    def timed(self: RowLoader, rows: int) -> Iterator[Rows]:
        own = batches(self, rows)
        while True:
            started = time.perf_counter()
            batch = next(own)
            waits.append(time.perf_counter() - started)
            yield batch

    weights = {"preset": "rho1-static", "column": COLUMN}
    settings = {"weights": weights, "heads": {"offsets": (1,)}, "from_scratch": True}
    settings |= {"max_steps": steps, "checkpoint_every": steps}
    config = TrainConfig(input=shards.path, model=str(work / "model"), output=work / "run", **settings, **STEP)
    with mock.patch.object(RowLoader, "batches", timed):
        summary = train(config)
    first, later = waits[0], waits[1:]
    seconds = summary["seconds"] - first
    return {
        "reader": f"a training step of {STEP['batch_size']} rows of {STEP['sequence_length']}",
        "step_seconds": seconds / len(later),
        "median_wait_seconds": statistics.median(later),
        "longest_wait_seconds": max(later),
        "waiting_share": sum(later) / seconds,
        "first_wait_seconds": first,
        "tokens_per_second": summary["tokens_per_second"],
    }


def waiting_table(row: dict[str, Any]) -> Table:
    """The table of these results."""
    table = Table("training step", title=row["reader"])
    table.add_column("", justify="right")
    table.add_row("step, ms", f"{1000 * row['step_seconds']:.1f}")
    waits = f"{1000 * row['median_wait_seconds']:.2f} / {1000 * row['longest_wait_seconds']:.2f}"
    table.add_row("waiting for rows, ms: median / maximum", waits)
    table.add_row("waiting, share of step time", f"{row['waiting_share']:.2%}")
    table.add_row("waiting for the first rows of the run, ms", f"{1000 * row['first_wait_seconds']:.0f}")
    table.add_row("tokens per second", f"{row['tokens_per_second']:,.0f}")
    return table


if __name__ == "__main__":
    main()
