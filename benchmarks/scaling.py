"""Cost of a scoring run excluding its engines: time and memory of the driver, and overhead of a worker.

    .venv/bin/python benchmarks/scaling.py [--units 1000 4000] [--parts driver overhead memory idle]

Everything is real (Ray, the job, workers, shards, manifests) except the engines, which return synthetic losses, either
immediately or at a fixed rate; only the part `idle` has real engines. The driver is measured on sets of many small
shards, each set in its own process, after a short warm-up run. Memory is resident memory per unit, above that before
the first step: "kept" after a step, "peak" during it.

The overhead is measured on one worker whose engines score exactly --rate tokens of the corpus per second. The memory of
a worker is measured with engines that take no time. This is the worst case, because reading and writing always lag.

`idle` is the time in which neither of two models in one worker computes, between the first and the last shard of a set
of small shards.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from weighted_mtp.pipelines import list as catalogue
from weighted_mtp.schemas.configs import ListConfig, WeightsConfig
from weighted_mtp.schemas.shard_set.fingerprints import directory_digest
from weighted_mtp.schemas.shard_set.manifest import CorpusInfo, Manifest, TokenizerInfo, read_manifest, write_manifest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, finish_shard_set
from weighted_mtp.schemas.shard_set.shards import list_column, shard_name, write_shard
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.claims import claim_output
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER, copy_files
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import plan_columns
from weighted_mtp.scoring.engines.base import EngineConfig, EngineMethod, Request
from weighted_mtp.scoring.engines.choice import choose_engine
from weighted_mtp.scoring.engines.loading import load_engine
from weighted_mtp.scoring.job.driver import ScoringJob
from weighted_mtp.scoring.job.finish import finish
from weighted_mtp.scoring.job.ray_cluster import ray_session
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.setup import describe_conditions, describe_request
from weighted_mtp.scoring.job.units import commit, find_done, gather
from weighted_mtp.scoring.job.worker_pool import WorkerPool
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.weighting import make_weighting

PARTS = ["driver", "overhead", "memory", "idle"]
VOCABULARY = 150_000
LENGTH = 2048
WARM_UP = 200
MIB = 1 << 20


class FakeEngine:
    """Losses from token ids and positions, distributed like real losses; `rate` is in tokens per second."""

    def __init__(self, model: ScoringModel, config: EngineConfig, rate: float | None = None) -> None:
        (model.directory / "pid").write_text(str(os.getpid()))
        self.rate = rate
        self.computed_tokens = 0
        self.losses = np.random.default_rng(0).gamma(0.6, 5.0, 1 << 16).astype(np.float32)
        self.noise = np.random.default_rng(1).normal(0.0, 0.3, 1 << 16).astype(np.float32) * (model.name == "base")

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        started = time.monotonic()
        results = []
        for request in requests:
            seed = request.input_ids.astype(np.uint32) * np.uint32(2654435761) + np.arange(len(request.input_ids)) * 31
            losses = np.maximum(self.losses[seed & 0xFFFF] + self.noise[seed >> 8 & 0xFFFF], 0)
            losses[0] = np.nan
            results.append(losses.astype(np.float32)[None])
        tokens = sum(len(request.input_ids) for request in requests)
        self.computed_tokens += tokens
        if self.rate:
            time.sleep(max(0.0, started + tokens / self.rate - time.monotonic()))
        return results


def main() -> None:
    arguments = parse()
    if arguments.one:
        print(json.dumps(measure_driver(arguments.one, arguments.work)))
        return
    console = Console(width=130)
    console.print(
        f"{len(os.sched_getaffinity(0))} cores, load average before {os.getloadavg()[0]:.1f}, in {arguments.work}"
    )
    if "driver" in arguments.parts:
        console.print(driver_report([run_driver(units, arguments.work) for units in arguments.units]))
    if "overhead" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            console.print(overhead_report(arguments, Path(work)))
    if "memory" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            console.print(memory_report(arguments, Path(work)))
    if "idle" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            console.print(idle_report(arguments, Path(work)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--units", type=int, nargs="+", default=[1000, 4000], help="shards of each set for the driver")
    add("--rate", type=float, default=50_000, help="tokens of the corpus scored per second by a worker's engines")
    add("--shard_tokens", type=int, default=1 << 18, help="tokens per shard for the overhead")
    add("--shards", type=int, default=8, help="number of shards for the overhead")
    add("--held_tokens", type=int, default=1 << 22, help="tokens per shard for the memory of a worker")
    add("--small_shards", type=int, default=20, help="number of small shards for the idle time of engines")
    add("--small_tokens", type=int, default=1 << 16, help="tokens per small shard")
    add("--engine", choices=["auto", "vllm", "transformers"], default="auto", help="engine whose idle time is measured")
    shm = Path("/dev/shm")
    add("--work", type=Path, default=shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir()), help="directory")
    add("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


class ObservedEngine:
    """A real engine that appends the start and the end of each call to the file `calls` beside its model."""

    def __init__(self, model: ScoringModel, config: EngineConfig) -> None:
        (model.directory / "pid").write_text(str(os.getpid()))
        self.engine = load_engine(model.directory, config)
        self.file = model.directory / "calls"

    @property
    def computed_tokens(self) -> int:
        """See `Engine.computed_tokens`."""
        return self.engine.computed_tokens

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        started = time.monotonic()
        scores = self.engine.score(requests)
        with self.file.open("a") as file:
            file.write(f"{started} {time.monotonic()}\n")
        return scores


def make_set(path: Path, units: int, shard_tokens: int, vocabulary: int = VOCABULARY) -> ShardSet:
    """Write a token set of `units` shards, all with the same content."""
    length = min(LENGTH, shard_tokens)
    lengths = np.full(shard_tokens // length, length)
    ids = np.random.default_rng(0).zipf(1.3, lengths.sum()) % vocabulary
    columns = {
        "document_id": pa.array([f"document-{row}" for row in range(len(lengths))]),
        "start": pa.array(np.zeros(len(lengths), np.int64)),
        "input_ids": list_column(ids.astype(np.int32), lengths),
    }
    (path / TOKENIZER).mkdir(parents=True)
    (path / DATA).mkdir()
    (path / TOKENIZER / "tokenizer.json").write_text("{}")
    names = [shard_name(index, units) for index in range(units)]
    entry = write_shard(path / DATA / names[0], pa.table(columns))
    content = (path / DATA / names[0]).read_bytes()
    for name in names[1:]:
        (path / DATA / name).write_bytes(content)
    corpus = {"input": "corpus", "text_field": "text", "max_length": length, "adds_bos": False, "adds_eos": False}
    ids_of_tokenizer = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    digest = directory_digest(path / TOKENIZER)
    manifest = Manifest(
        corpus=CorpusInfo(**corpus, documents=units, rejects=0),
        tokenizer=TokenizerInfo(name="fake", fingerprint="fake", files_sha256=digest, **ids_of_tokenizer),
        shards=[replace(entry, name=name) for name in names],
        request={"command": "prepare"},
    )
    return finish_shard_set(path, manifest, {})


@dataclass
class Run:
    """A scoring run with the steps of `wmtp score`, with real engines if their settings are given."""

    source: ShardSet
    output: Path
    workers: int
    models: tuple[str, ...] = ("reference", "base")
    rate: float | None = None
    engine: EngineConfig | None = None
    started: float = 0.0
    process: Path = field(init=False)
    base_rss: int = field(init=False)
    base_cpu: float = field(init=False)

    def __post_init__(self) -> None:
        models = []
        for name in self.models:
            directory = self.output.with_name(f"{self.output.name}-models") / name
            directory.mkdir(parents=True)
            models.append(ScoringModel(name, directory, name, None))
        self.plan = plan_columns(models[0], models[1] if models[1:] else None, None)
        engine = self.engine or EngineConfig("transformers", None, "float32", 8192, self.source.manifest.longest, 1)
        self.task = ScoringTask(self.source.reader, self.output, self.plan, engine, None)
        self.origins = {**describe_conditions(self.plan, engine), **self.plan.contrasts}
        self.request = describe_request(self.source, self.origins)
        self.output.mkdir()
        claim_output(self.output, self.request)
        copy_files(self.source.tokenizer_path, self.output / TOKENIZER)

    def score(self, at_end: Callable[[], None] = lambda: None) -> float:
        """Score all shards; return the seconds since the first worker was ready. Calls `at_end` before workers stop."""
        synthetic = partial(FakeEngine, rate=self.rate and self.rate * len(self.plan.models))
        load = ObservedEngine if self.engine else synthetic
        units = self.source.manifest.shards
        pool = WorkerPool(self.workers, self.workers, 1.0, 0.0)
        job = ScoringJob(self.task, units, pool, print, partial(commit, self.output), load)
        ended = 0.0
        for progress in job.run():
            if not self.started and progress.workers:
                self.started = time.monotonic()
                self.process = Path("/proc") / (self.plan.models[0].directory / "pid").read_text()
                (self.process / "clear_refs").write_text("5")
                self.base_rss, self.base_cpu = memory(self.process, "VmRSS"), cpu_seconds(self.process)
            if progress.units == len(units):
                ended = time.monotonic()
                at_end()
        return ended - self.started

    def finish(self) -> ShardSet:
        """Finish the scored set."""
        return finish(self.output, self.source, self.origins, self.request)


def memory(process: Path, which: str) -> int:
    """`VmRSS` or `VmHWM` of a process in bytes."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


def cpu_seconds(process: Path) -> float:
    """User and system time of a process."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Steps:
    """Seconds, CPU seconds and memory of this process, step by step."""

    def __init__(self) -> None:
        self.process = Path("/proc/self")
        self.rows: dict[str, dict[str, float]] = {}
        gc.collect()
        self.base = memory(self.process, "VmRSS")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a block; memory is in bytes above the start."""
        (self.process / "clear_refs").write_text("5")
        started, cpu = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = memory(self.process, "VmHWM") - self.base
        gc.collect()
        kept = memory(self.process, "VmRSS") - self.base
        self.rows[name] = {"seconds": seconds, "cpu": cpu, "kept": kept, "peak": peak}


def run_driver(units: int, work: Path) -> dict[str, Any]:
    """Measure a driver in its own process."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        command = [sys.executable, __file__, "--one", str(units), "--work", directory]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"units": units, **json.loads(done.stdout.splitlines()[-1])}


def measure_driver(units: int, work: Path) -> dict[str, Any]:
    """Measure all steps of a run with `units` units, and of the commands that read its result."""
    with ray_session(None, WorkerPool(2, 2, 1.0, 0.0)):
        warm_up = Run(make_set(work / "warm_up", WARM_UP, 64), work / "warm_up_scored", 2, ("reference",))
        warm_up.score()
        catalogue_of(warm_up.finish().path)
        make_set(work / "tokens", units, 64)
        steps = Steps()
        with steps.step("open the source"):
            source = ShardSet.open(work / "tokens")
        run = Run(source, work / "scored", 2, ("reference",))
        with steps.step("score"):
            run.score()
        with steps.step("find_done"):
            find_done(run.output, source.manifest.shards)
        with steps.step("gather"):
            gather(run.output, [shard.name for shard in source.manifest.shards])
        with steps.step("finish, including gather"):
            shards = run.finish()
    with steps.step("write the manifest again"):
        write_manifest(shards.path, shards.manifest)
    with steps.step("open the result"):
        shards = ShardSet.open(run.output)
    with steps.step("bytes of columns"):
        shards.bytes_per_token()
    del shards
    with steps.step("wmtp list"):
        catalogue_of(run.output)
    with steps.step("wmtp verify"):
        faults = [check for check in verify(run.output, read_manifest(run.output)) if check.fault]
    assert not faults
    with steps.step("loader for training"):
        zipped = ZippedSets((source,))
        RowLoader(zipped, make_weighting(WeightsConfig(), zipped), LENGTH)
    return {"manifest": (run.output / "manifest.json").stat().st_size, "steps": steps.rows}


def catalogue_of(path: Path) -> None:
    """`wmtp list`."""
    with contextlib.redirect_stdout(io.StringIO()):
        catalogue.run(ListConfig(directories=[path]))


def driver_report(results: list[dict[str, Any]]) -> Table:
    """Seconds (CPU seconds of the process) and bytes per unit for each step and size."""
    table = Table("driver", title="seconds (CPU), memory in bytes per unit: kept / peak")
    for result in results:
        table.add_column(f"{result['units']:,} units", justify="right")
    for name in results[0]["steps"]:
        cells = []
        for result in results:
            row, units = result["steps"][name], result["units"]
            cells.append(
                f"{row['seconds']:.2f} ({row['cpu']:.2f})  {row['kept'] / units:,.0f} / {row['peak'] / units:,.0f}"
            )
        table.add_row(name, *cells)
    table.add_row("units scored per second", *(f"{r['units'] / r['steps']['score']['seconds']:.0f}" for r in results))
    table.add_row("manifest, bytes per unit", *(f"{r['manifest'] / r['units']:.0f}" for r in results))
    return table


def overhead_report(arguments: argparse.Namespace, work: Path) -> Table:
    """Time of a one-worker run beyond its engines' time."""
    source = make_set(work / "tokens", arguments.shards, arguments.shard_tokens)
    run = Run(source, work / "scored", 1, rate=arguments.rate)
    cpu: list[float] = []
    with ray_session(None, WorkerPool(1, 1, 1.0, 0.0)):
        wall = run.score(lambda: cpu.append(cpu_seconds(run.process) - run.base_cpu))
        started = time.perf_counter()
        gather(run.output, [shard.name for shard in source.manifest.shards])
        gathered = (time.perf_counter() - started) / arguments.shards
        records = sum(path.stat().st_size for path in (run.output / ".progress").glob("*.parquet"))
        shards = run.finish()
    tokens = source.manifest.tokens
    engine = tokens / arguments.rate
    timings = shards.manifest.timings
    assert timings is not None
    sizes = shards.bytes_per_token()
    scores = sum(sizes[name] for name in run.plan.columns) / len(run.plan.columns)
    table = Table("one worker", title=f"{arguments.shards} shards of {arguments.shard_tokens:,} tokens, 3 columns")
    table.add_column("seconds", justify="right")
    table.add_column("of the engines' time", justify="right")
    for name, seconds in {
        f"engines, {arguments.rate:,.0f} tokens/s": engine,
        "run, from the first worker ready": wall,
        "overhead": wall - engine,
        "reading": sum(timings.read_seconds),
        "writing, compression and checksums": sum(timings.write_seconds),
        "CPU of the worker, with synthetic losses": cpu[0],
    }.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / engine:.1%}")
    table.caption = (
        f"{sizes['input_ids']:.2f} bytes per token id, {scores:.2f} per token and score; a record has "
        f"{records / arguments.shards:,.0f} bytes, the driver gathers one in {gathered * 1000:.1f} ms"
    )
    return table


def memory_report(arguments: argparse.Namespace, work: Path) -> Table:
    """Peak memory of a worker, above its memory with loaded engines."""
    table = Table("a worker that scores", title=f"shards of {arguments.held_tokens:,} tokens, 3 columns")
    for name in ("MiB above loaded", "bytes per token of a shard", "ratio to one shard"):
        table.add_column(name, justify="right")
    alone = 0
    for units in (1, 2, 4, 8):
        source = make_set(work / f"tokens-{units}", units, arguments.held_tokens)
        run = Run(source, work / f"scored-{units}", 1)
        peaks: list[int] = []
        with ray_session(None, WorkerPool(1, 1, 1.0, 0.0)):
            run.score(lambda run=run, peaks=peaks: peaks.append(memory(run.process, "VmHWM") - run.base_rss))
        alone = alone or peaks[0]
        row = f"{peaks[0] / MIB:,.0f}", f"{peaks[0] / arguments.held_tokens:.0f}", f"{peaks[0] / alone:.2f}"
        table.add_row(f"{units} units", *row)
    return table


def idle_report(arguments: argparse.Namespace, work: Path) -> Table:
    """Time between the calls of real engines: two tiny models, for which everything else takes long, and one worker."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    source = make_set(work / "tokens", arguments.small_shards, arguments.small_tokens, config.vocab_size)
    name = choose_engine(arguments.engine)
    method: EngineMethod | None = "pooler" if name == "vllm" else None
    threads = len(os.sched_getaffinity(0))
    engine = EngineConfig(name, method, "float32", 8192, source.manifest.longest, threads)
    run = Run(source, work / "scored", 1, engine=engine)
    disable_progress_bar()
    for model in run.plan.models:
        LlamaForCausalLM(config).save_pretrained(model.directory)
    with ray_session(None, WorkerPool(1, 1, 1.0, 0.0)):
        run.score()
    calls = []
    for model in run.plan.models:
        lines = (model.directory / "calls").read_text().splitlines()[1:]  # the first call is the probe
        calls += [tuple(map(float, line.split())) for line in lines]
    calls.sort()
    gaps = np.array([start - end for (_, end), (start, _) in pairwise(calls)])
    total = calls[-1][1] - calls[0][0]
    table = Table("idle engines", title=f"{arguments.small_shards} shards of {arguments.small_tokens:,} tokens, {name}")
    table.add_column("seconds", justify="right")
    table.add_column("of the total", justify="right")
    table.add_row("first call to the end of the last", f"{total:.2f}", "100.0 %")
    table.add_row(f"between the {len(calls)} calls", f"{gaps.sum():.3f}", f"{gaps.sum() / total:.2%}")
    table.add_row("longest gap", f"{gaps.max():.3f}", f"{gaps.max() / total:.2%}")
    return table


if __name__ == "__main__":
    main()
