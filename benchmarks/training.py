"""Seconds per training step: the cost of weights and heads, and other trainers on the same rows.

    .venv/bin/python benchmarks/training.py [--only selection] [--rounds 10] [--threads 2]
    .venv/bin/python benchmarks/training.py --only weighting --rows 1 --rounds 20
    .venv/bin/python benchmarks/training.py --only objectives --rounds 10
    .venv/bin/python benchmarks/training.py --model qwen2.5-0.5b --rounds 20 [--compile] [--attention NAME]

The fourth command is for a GPU, which is used if available. It also runs Hugging Face's Trainer with Liger's kernels,
and prints memory and model FLOP utilisation. `pip install -e .[dev]` installs TRL, `pip install liger-kernel` Liger;
missing packages are skipped.

Each step is complete: batch, forward and backward pass, clipping, AdamW. Ours use `TrainingLoop`. Rows come from a
shard set of random tokens and scores, and all implementations start from the same random model. On a CPU they take
turns, one step each per round, and time is CPU time of one thread (with `--threads` above 1, wall-clock time). On a GPU
they run one after another, to give each the whole memory.
"""

import argparse
import gc
import io
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    logging,
)

from weighted_mtp.schemas.configs import DirectDecodingConfig, HeadsConfig, ObjectiveConfig, TrainConfig, WeightsConfig
from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest
from weighted_mtp.schemas.shard_set.manifest import Contrast, CorpusInfo, Manifest, ScoreColumn, TokenizerInfo
from weighted_mtp.schemas.shard_set.shard_set import finish_shard_set
from weighted_mtp.schemas.shard_set.shards import list_column, shard_name, write_shard
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.loss.shifted_targets import select_targets
from weighted_mtp.training.model.decoder_layers import compile_layers
from weighted_mtp.training.model.flops import StepFlops, peak_flops
from weighted_mtp.training.model.mtp_model import MTPModel, build_model
from weighted_mtp.training.model.trainable_parameters import freeze_embeddings
from weighted_mtp.training.optimizer import make_optimizer
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.run.train import make_accelerator
from weighted_mtp.training.schedules import make_learning_rate_schedule
from weighted_mtp.training.trainer import TrainingLoop
from weighted_mtp.training.weighting import make_weighting

CONSOLE = Console(width=130)
GPU = torch.cuda.is_available()
WARM_UP = 3  # unmeasured steps on a GPU, besides the first
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
ATTENTION_HEADS = ("num_attention_heads", "num_key_value_heads")
CONFIGS = {
    "tiny": LlamaConfig(**dict(zip(SIZES + ATTENTION_HEADS, (512, 64, 128, 2, 2, 2), strict=True))),
    "small": LlamaConfig(**dict(zip(SIZES + ATTENTION_HEADS, (32000, 512, 1376, 8, 8, 8), strict=True))),
    "qwen2.5-0.5b": Qwen2Config(
        **dict(zip(SIZES + ATTENTION_HEADS, (151936, 896, 4864, 24, 14, 2), strict=True)), tie_word_embeddings=True
    ),
}
SHAPES = {"tiny": (2, 64), "small": (2, 256), "qwen2.5-0.5b": (4, 4096)}
"""Default number of rows per step and their length."""

UNIFORM = WeightsConfig()
DENSE = WeightsConfig(preset="dense", lam=0.25)
PLAIN, UNIFORM_4, DENSE_4 = "next token, uniform", "4 heads, uniform", "4 heads, all weighted"
AGAIN, SELECTED_60, SELECTED_25 = "4 heads, uniform, once more", "4 heads, 60 % selected", "4 heads, 25 % selected"
SHARPER, RANKED = "next token, beta -0.25", "next token, beta -0.25, top 100 and tail"
ORDER, CYCLE = "next token and token order", "next token, cycle of 4"
ONE, FOUR = HeadsConfig(offsets=(1,)), HeadsConfig(offsets=(1, 2, 3, 4))
PRECISION = ObjectiveConfig(kind="diversity_or_precision", beta=-0.25)
TRAINER, LIGER, TRL = "Trainer, next token", "Trainer with Liger, next token", "SFTTrainer, next token"
OURS = {
    PLAIN: (UNIFORM, ONE, ObjectiveConfig()),
    UNIFORM_4: (UNIFORM, FOUR, ObjectiveConfig()),
    AGAIN: (UNIFORM, FOUR, ObjectiveConfig()),
    DENSE_4: (DENSE, FOUR, ObjectiveConfig()),
    SELECTED_60: (WeightsConfig(preset="rho1-static", fraction=0.6), FOUR, ObjectiveConfig()),
    SELECTED_25: (WeightsConfig(preset="rho1-static", fraction=0.25), FOUR, ObjectiveConfig()),
    SHARPER: (UNIFORM, ONE, PRECISION),
    RANKED: (UNIFORM, ONE, PRECISION.model_copy(update={"lambda_tail": -0.1})),
    ORDER: (UNIFORM, ONE.model_copy(update={"top_coefficient": 1.0}), ObjectiveConfig()),
    CYCLE: (
        UNIFORM,
        ONE.model_copy(update={"dmtd": DirectDecodingConfig(cycle=4, decoding_layers=2)}),
        ObjectiveConfig(),
    ),
}
"""Weights, heads and objective of each implementation."""

PACKAGES = {TRAINER: "transformers", LIGER: "liger_kernel", TRL: "trl"}
COMPARISONS = {
    "selection": [(SELECTED_60, DENSE_4, 0.75), (SELECTED_25, PLAIN, 1.15)],
    "weighting": [(DENSE_4, UNIFORM_4, 1.01), (AGAIN, UNIFORM_4, None)],
    "objectives": [
        (SHARPER, PLAIN, None),
        (RANKED, PLAIN, None),
        (ORDER, PLAIN, None),
        (UNIFORM_4, PLAIN, None),
        (CYCLE, PLAIN, None),
    ],
    "trainers": [(PLAIN, TRAINER, 1.0), (PLAIN, LIGER, 1.0), (PLAIN, TRL, 1.0)],
}
"""Numerator, denominator and upper bound of each ratio. A ratio of identical runs shows the noise."""


class Job(NamedTuple):
    """Shared by all implementations: command arguments, a directory with model and shard set, and a clock."""

    arguments: argparse.Namespace
    directory: Path
    now: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="small")
    parser.add_argument("--only", choices=list(COMPARISONS), help="run one group of comparisons; default all")
    parser.add_argument("--rows", type=int, help="rows per step; default 2, or 4 for qwen2.5-0.5b")
    parser.add_argument("--length", type=int, help="tokens per row; default 256, or 4096 for qwen2.5-0.5b")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each implementation")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--attention", default="sdpa", help="attention implementation of transformers")
    parser.add_argument("--compile", action="store_true", help="compile decoder layers with torch.compile")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads on a CPU")
    parser.add_argument(
        "--one_by_one", action="store_true", default=GPU, help="one implementation after another; always on a GPU"
    )
    parser.add_argument("--json", type=Path, help="output file for the settings and rows")
    arguments = parser.parse_args()
    rows, length = SHAPES[arguments.model]
    arguments.rows, arguments.length = arguments.rows or rows, arguments.length or length
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    now = synchronized_time if GPU else time.process_time if arguments.threads == 1 else time.perf_counter
    comparisons = [c for group, found in COMPARISONS.items() if arguments.only in (None, group) for c in found]
    names = [name for name in (*OURS, *PACKAGES) if any(name in pair[:2] for pair in comparisons)]
    for name in [name for name in names if name in PACKAGES and not available(name)]:
        CONSOLE.print(f"{name}: skipped, {PACKAGES[name]} is not installed or needs a GPU")
        names.remove(name)
    with tempfile.TemporaryDirectory() as directory:
        job = Job(arguments, Path(directory), now)
        write_model(job)
        write_shards(job)
        seconds, notes = one_by_one(job, names) if arguments.one_by_one else in_turns(job, names)
        tokens = float(job_rows(job, UNIFORM).tokens.mean()) * arguments.rows
    rows: list[dict[str, Any]] = []
    for name in names:
        row = {"implementation": name} | notes.get(name, {})
        if name in seconds:
            row |= {"seconds": seconds[name], "tokens_per_second": tokens / statistics.median(seconds[name])}
        rows.append(row)
    report(rows, title(arguments))
    compare(seconds, comparisons)
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": {"step": title(arguments)}, "rows": rows}, indent=2) + "\n")


def available(name: str) -> bool:
    """Whether this external trainer can run here."""
    return find_spec(PACKAGES[name]) is not None and (name != LIGER or GPU)


def title(arguments: argparse.Namespace) -> str:
    """Title with model, batch, dtype and hardware."""
    place = torch.cuda.get_device_name() if GPU else f"{arguments.threads} thread(s)"
    compiled = ", compiled" if arguments.compile else ""
    return f"{arguments.model}, {arguments.rows} x {arguments.length} tokens, {arguments.dtype}{compiled}, {place}"


def synchronized_time() -> float:
    """Wall-clock time in seconds, after all GPU work has finished."""
    torch.cuda.synchronize()
    return time.perf_counter()


def write_model(job: Job) -> None:
    """Write the model config, and a tokenizer for trainers that need one."""
    config = CONFIGS[job.arguments.model]
    config.save_pretrained(job.directory / "model")
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(job.directory / "set" / TOKENIZER)


def write_shards(job: Job) -> None:
    """Write a shard set of random tokens that packs well, with score columns `excess_loss` and `long_short`."""
    length, vocabulary = job.arguments.length, CONFIGS[job.arguments.model].vocab_size
    rng = np.random.default_rng(0)
    first = rng.integers(length // 8, length - length // 8, 64 * job.arguments.rows)
    lengths = np.stack([first, length - first], 1).ravel()
    starts = np.cumsum(lengths) - lengths
    columns, counts = {}, {}
    for name in ("excess_loss", "long_short"):
        scores = rng.standard_normal(lengths.sum()).astype(np.float16)
        scores[starts] = np.nan
        columns[name] = list_column(scores, lengths)
        counts[name] = ValueCounts()
        counts[name].add(scores)
    tokens = {
        "document_id": pa.array([f"document-{number}" for number in range(len(lengths))]),
        "start": pa.array(np.zeros(len(lengths), np.int64)),
        "input_ids": list_column(rng.integers(0, vocabulary, lengths.sum()).astype(np.int32), lengths),
    }
    path = job.directory / "set"
    (path / DATA).mkdir()
    shard = write_shard(path / DATA / shard_name(0, 1), pa.table(tokens | columns))
    origin = Contrast(minuend="loss_base", subtrahend="loss_reference")
    manifest = Manifest(
        corpus=CorpusInfo(
            input="random",
            text_field="text",
            max_length=length,
            adds_bos=False,
            adds_eos=False,
            documents=len(lengths),
            rejects=0,
        ),
        tokenizer=TokenizerInfo(
            name="none",
            fingerprint="",
            files_sha256=directory_digest(path / TOKENIZER),
            vocab_size=vocabulary,
            bos_token_id=0,
            eos_token_id=1,
        ),
        columns={name: ScoreColumn(origin=origin, statistics=counts[name].statistics()) for name in columns},
        shards=[shard],
        request={"command": "benchmark"},
    )
    finish_shard_set(path, manifest, counts)


def job_loader(job: Job, weights: WeightsConfig) -> RowLoader:
    """The loader of a run; the row order is the same for all weights."""
    shards = ZippedSets.open([str(job.directory / "set")])
    return RowLoader(shards, make_weighting(weights, shards), job.arguments.length)


def job_rows(job: Job, weights: WeightsConfig) -> Rows:
    """The first rows of a run, enough for several steps."""
    return next(job_loader(job, weights).batches(8 * job.arguments.rows))


def job_model(job: Job, heads: HeadsConfig) -> MTPModel:
    """The initial model of all implementations."""
    torch.manual_seed(0)
    source = str(job.directory / "model")
    model = build_model(source, heads, from_scratch=True, attention=job.arguments.attention)
    model.trunk.config.use_cache = False  # otherwise documents in a row attend to each other
    return model


class Implementation(ABC):
    """An implementation of optimizer steps."""

    flops: float
    """Mean FLOPs per step."""

    @abstractmethod
    def run(self, steps: int) -> list[float]:
        """Take steps and return the seconds of each."""


class Ours(Implementation):
    """Steps of `TrainingLoop`, after one unmeasured step."""

    def __init__(self, job: Job, weights: WeightsConfig, heads: HeadsConfig, objective: ObjectiveConfig) -> None:
        arguments = job.arguments
        config = TrainConfig(
            input=str(job.directory / "set"),
            model=str(job.directory / "model"),
            output=str(job.directory / "run"),
            weights=weights,
            heads=heads,
            objective=objective,
            batch_size=arguments.rows,
            micro_batch_size=arguments.rows,
            log_every=1_000_000,
        )
        accelerator = make_accelerator(arguments.dtype)
        model = job_model(job, config.heads)
        if heads.dmtd.cycle > 1:
            freeze_embeddings(model.trunk)  # as with a pretrained model
        self.flops = mean_flops(model, job, weights)
        if arguments.compile:
            compile_layers(model)
        optimizer = make_optimizer(model, config.optimizer)
        scheduler = make_learning_rate_schedule(optimizer, config.optimizer, steps=1_000_000)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        loader = job_loader(job, weights)
        flops = StepFlops(model)
        loop = TrainingLoop(accelerator, config, prepared, optimizer, scheduler, loader, flops, steps=1_000_000)
        self.now = job.now
        self.steps: Iterator[Any] = loop.run()
        self.run(1)

    def run(self, steps: int) -> list[float]:
        """Take steps."""
        seconds = []
        for _ in range(steps):
            started = self.now()
            next(self.steps)
            seconds.append(self.now() - started)
        return seconds


class Others(Implementation):
    """Steps of Hugging Face's `Trainer` or a subclass; the first step of each call is not measured."""

    def __init__(self, job: Job, name: str) -> None:
        self.job, self.name = job, name
        model = job_model(job, ONE)
        self.flops = mean_flops(model, job, UNIFORM)
        self.model = model.trunk
        self.rows = job_rows(job, UNIFORM)

    def run(self, steps: int) -> list[float]:
        """Train for one additional step, and return the seconds of the others."""
        clock = StepClock(self.job.now)
        trainer = (self._sft_trainer if self.name == TRL else self._trainer)(steps + 1)
        trainer.add_callback(clock)
        trainer.train()
        return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]

    def _settings(self, steps: int) -> dict[str, Any]:
        arguments = self.job.arguments
        return {
            "output_dir": str(self.job.directory / "trainer"),
            "per_device_train_batch_size": arguments.rows,
            "max_steps": steps,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "bf16": arguments.dtype == "bfloat16" or (arguments.dtype == "auto" and GPU),
            "use_liger_kernel": self.name == LIGER,
            "torch_compile": arguments.compile,
            "use_cpu": not GPU,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def _trainer(self, steps: int) -> Trainer:
        ids, positions = (torch.from_numpy(values).long() for values in self.rows[:2])
        labels = ids.masked_fill(positions == 0, -100)
        rows = [
            dict(zip(("input_ids", "position_ids", "labels"), row, strict=True))
            for row in zip(ids, positions, labels, strict=True)
        ]
        settings = TrainingArguments(**self._settings(steps), remove_unused_columns=False)
        return Trainer(self.model, settings, train_dataset=rows, data_collator=default_data_collator)

    def _sft_trainer(self, steps: int) -> Trainer:
        """TRL packs rows without padding. It joins a batch into one row, unless that needs a mask of (B T)^2."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = self.job.arguments
        rows = []
        for ids, positions, tokens in zip(self.rows.input_ids, self.rows.position_ids, self.rows.tokens, strict=True):
            starts = np.flatnonzero(positions[:tokens] == 0)
            labels = np.where(positions[:tokens] == 0, -100, ids[:tokens])
            lengths = np.diff(np.append(starts, tokens))
            rows.append({"input_ids": ids[:tokens], "labels": labels, "seq_lengths": lengths})
        settings = SFTConfig(
            **self._settings(steps),
            padding_free=not GPU or arguments.attention.startswith("flash"),
            max_length=None,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.job.directory / "set" / TOKENIZER)
        return SFTTrainer(self.model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


class StepClock(TrainerCallback):
    """Records the end time of each step."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the time."""
        self.ends.append(self.now())


def mean_flops(model: MTPModel, job: Job, weights: WeightsConfig) -> float:
    """Mean FLOPs per step, over the first steps."""
    rows = job_rows(job, weights)
    ids, positions, values = (torch.from_numpy(array) for array in rows[:3])
    offsets = [int(prediction) if prediction.isdigit() else 1 for prediction in model.heads_config.predictions]
    selected = torch.tensor([float(len(select_targets(ids, positions, values, o).rows)) for o in offsets])
    pairs = float(rows.position_ids.sum(dtype="int64") + rows.tokens.sum())
    return StepFlops(model)(float(rows.tokens.sum()), pairs, selected) * job.arguments.rows / len(rows.tokens)


def make(job: Job, name: str) -> Implementation:
    """Build an implementation, ready to run."""
    return Others(job, name) if name in PACKAGES else Ours(job, *OURS[name])


def in_turns(job: Job, names: list[str]) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each step of all implementations, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        implementations = {name: make(job, name) for name in names}
        for number in range(job.arguments.rounds):
            for name in names if number % 2 else names[::-1]:
                seconds[name] += implementations[name].run(1)
    return seconds, {}


def one_by_one(job: Job, names: list[str]) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each measured step, one implementation at a time, with peak memory and model FLOP utilisation.

    One that fails has an error instead, and the next one runs.
    """
    seconds: dict[str, list[float]] = {}
    notes: dict[str, dict[str, Any]] = {}
    peak = peak_flops(torch.device("cuda" if GPU else "cpu"))
    for name in names:
        implementation = None
        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                implementation = make(job, name)
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                seconds[name] = implementation.run(WARM_UP + job.arguments.rounds)[WARM_UP:]
            notes[name] = {"peak_bytes": torch.cuda.max_memory_allocated()} if GPU else {}
            if peak:
                notes[name]["utilisation"] = implementation.flops / statistics.median(seconds[name]) / peak
        except Exception as error:  # of any type, from any package
            notes[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
        del implementation
        gc.collect()
        torch.cuda.empty_cache()
    return seconds, notes


def report(rows: list[dict[str, Any]], title: str) -> None:
    """Print step time and tokens per second, and on a GPU memory and utilisation."""
    result = Table("training step", title=title)
    for column in ("fastest, s", "median, s", "tokens/s", *(("GiB", "MFU") if GPU else ())):
        result.add_column(column, justify="right")
    for row in rows:
        if "error" in row:
            result.add_row(row["implementation"], "failed")
            CONSOLE.print(f"{row['implementation']}: {row['error']}", markup=False)
            continue
        seconds = row["seconds"]
        texts = [f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}", f"{row['tokens_per_second']:,.0f}"]
        if "peak_bytes" in row:
            texts.append(f"{row['peak_bytes'] / 2**30:.1f}")
        if "utilisation" in row:
            texts.append(f"{row['utilisation']:.1%}")
        result.add_row(row["implementation"], *texts)
    CONSOLE.print(result)


def compare(seconds: dict[str, list[float]], comparisons: list[tuple[str, str, float | None]]) -> None:
    """Print ratios of fastest steps and of median steps, and quartiles of the ratios in each round."""
    result = Table("step time of", "divided by", title="ratios")
    for column in ("fastest", "medians", "quartiles of rounds", "at most"):
        result.add_column(column, justify="right")
    for name, other, target in comparisons:
        if name in seconds and other in seconds:
            a, b = seconds[name], seconds[other]
            quotients = np.array(a) / np.array(b)
            medians = statistics.median(a) / statistics.median(b)
            spread = "{:.3f}, {:.3f}, {:.3f}".format(*np.quantile(quotients, (0.25, 0.5, 0.75)))
            aim = "" if target is None else f"{target:.2f}"
            result.add_row(name, other, f"{min(a) / min(b):.3f}", f"{medians:.3f}", spread, aim)
    CONSOLE.print(result)


if __name__ == "__main__":
    main()
