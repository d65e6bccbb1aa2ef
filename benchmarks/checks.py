"""What the checks of shards cost, as a share of the time of scoring and of a training step.

    .venv/bin/python benchmarks/checks.py [--tokens 1048576] [--steps 100] [--rounds 15] [--engines transformers vllm]

A worker of `wmtp score` compares the SHA-256 of each shard with the manifest. `wmtp train` compares size, footer and
schema of a file with the manifest for each row group that it reads. Both check list lengths, token ids and numbers.
The cost is the CPU time of these reads, less that of pyarrow for the same data with page checksums; the two take turns,
on one thread. The models are as small as they get, which makes the shares as large as they get.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from loader import COLUMN, STEP, make_set
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from weighted_mtp.schemas.configs import ScoreConfig, TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files
from weighted_mtp.scoring.job.run import score
from weighted_mtp.training.run.train import train

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
READ = ["input_ids", COLUMN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="tokens of the set")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--rounds", type=int, default=15, help="number of times each reader reads the set")
    engines = ["transformers", *["vllm"] * bool(find_spec("vllm"))]
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as directory:
        work = Path(directory)
        shards = make_set(work / "set", arguments.tokens)
        model = work / "model"
        config = LlamaConfig(vocab_size=shards.manifest.tokenizer.vocab_size, tie_word_embeddings=True, **SIZES)
        LlamaForCausalLM(config).save_pretrained(model)
        copy_files(shards.path / TOKENIZER, model)
        tokens = shards.manifest.tokens
        seconds = {f"scoring, {name}": scoring(shards, name, work) / tokens for name in arguments.engines}
        seconds["training"] = 1 / train_rate(shards, work, arguments.steps)
        costs = {"scoring": cost(read_shard, plain_shard, shards, arguments.rounds)}
        costs["training"] = cost(read_groups, plain_groups, shards, arguments.rounds)

    title = f"{tokens:,} tokens, load average {os.getloadavg()[0]:.1f}"
    table = Table("", title=title, caption=f"medians of {arguments.rounds} rounds, with quartiles")
    for heading in ("tokens/s", "checks, ns per token", "share of the time", "share is 1 % at tokens/s"):
        table.add_column(heading, justify="right")
    for name, own in seconds.items():
        low, median, high = costs[name.split(",")[0]]
        nanoseconds = f"{median * 1e9:.2f} ({low * 1e9:.2f} to {high * 1e9:.2f})"
        table.add_row(name, f"{1 / own:,.0f}", nanoseconds, f"{median / own:.3%}", f"{0.01 / median:,.0f}")
    Console(width=130).print(table)


def scoring(shards: ShardSet, engine: str, work: Path) -> float:
    """Seconds of an engine for the losses of the set with the model in `work`."""
    output = work / f"scored-{engine}"
    config = ScoreConfig(input=shards.path, output=output, reference=str(work / "model"), engine=engine)
    return sum(score(config).manifest.timings.score_seconds)


def train_rate(shards: ShardSet, work: Path, steps: int) -> float:
    """Tokens per second of training with rows of the set, as in benchmarks/loader.py."""
    weights = {"preset": "rho1-static", "column": COLUMN}
    settings = {"weights": weights, "heads": {"offsets": (1,)}, "max_steps": steps, "checkpoint_every": steps}
    summary = train(TrainConfig(input=shards.path, model=str(work / "model"), output=work / "run", **settings, **STEP))
    return float(summary["tokens_per_second"])


def read_shard(shards: ShardSet, number: int) -> None:
    """Read a shard as a scoring worker does."""
    shards.file(number).read_hashed()


def plain_shard(shards: ShardSet, number: int) -> None:
    """Read it without checks except page checksums."""
    content = shards.file(number).path.read_bytes()
    pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read()


def read_groups(shards: ShardSet, number: int) -> None:
    """Read the row groups of a shard as training does."""
    for group in range(shards.manifest.shards[number].row_groups):
        shards.read(number, READ, group)


def plain_groups(shards: ShardSet, number: int) -> None:
    """Read them without checks except page checksums."""
    path = str(shards.file(number).path)
    for group in range(shards.manifest.shards[number].row_groups):
        with pq.ParquetFile(pa.OSFile(path), page_checksum_verification=True) as file:
            file.read_row_group(group, READ)


Reader = Callable[[ShardSet, int], None]


def cost(checked: Reader, plain: Reader, shards: ShardSet, rounds: int) -> tuple[float, float, float]:
    """CPU seconds per token by which one reader is slower than the other: lower quartile, median, upper quartile."""
    pa.set_cpu_count(1)
    differences = []
    for _ in range(rounds):
        own, other = (cpu_seconds(reader, shards) for reader in (checked, plain))
        differences.append((own - other) / shards.manifest.tokens)
    low, median, high = statistics.quantiles(differences, n=4)
    return low, median, high


def cpu_seconds(reader: Reader, shards: ShardSet) -> float:
    """CPU time for reading all shards."""
    started = time.process_time()
    for number in range(len(shards.manifest.shards)):
        reader(shards, number)
    return time.process_time() - started


if __name__ == "__main__":
    main()
