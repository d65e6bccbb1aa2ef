"""The Ray job: shards are work units, workers are actors that hold the engines and write what they score.

Units are fixed and their files deterministic, so doing one twice is harmless and a rerun does only what is missing.
Only the outcome of a unit travels back to the driver.
"""

import logging
import os
import re
import signal
import socket
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from schemas.errors import UserError, first_line
from schemas.manifest import SHARD_ENTRY, ShardEntry
from scoring.scorer import ScoringTask, ShardScorer

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # on cores shared with anything else, spinning threads cost a factor of five
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in this environment however the driver was started
}


@dataclass(frozen=True)
class Workers:
    """How many workers a job has and the GPUs that each of them holds: a share of one, several, or 0 on the CPU."""

    count: int
    gpus: float

    @classmethod
    def plan(cls, wanted: int, gpus: int, tensor_parallel_size: int) -> "Workers":
        """Place `wanted` workers evenly on the GPUs; by default as many as the GPUs hold, or one on the CPU."""
        if not gpus:
            return cls(wanted or 1, 0.0)
        if tensor_parallel_size > 1:
            return cls(wanted or max(1, gpus // tensor_parallel_size), float(tensor_parallel_size))
        count = wanted or gpus
        return cls(count, 1 / -(-count // gpus))


class UnitScorer:
    """The Ray actor: scores the units it is given.

    Failures are returned, not raised: Ray would retry them, wrap them, and print pages.
    """

    def __init__(self, task: ScoringTask) -> None:
        self.task = task
        self.scorer: ShardScorer | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the one shard in `batch` and say what went wrong, if anything did."""
        shard = SHARD_ENTRY.validate_json(batch["shard"][0])
        failure: dict[str, Any] = {"error": "", "traceback": ""}
        try:
            self.scorer = self.scorer or ShardScorer(self.task)
            self.scorer.score(shard)
        except Exception as error:
            failure = {"error": describe(error, shard.name), "traceback": traceback.format_exc()}
        return {name: [value] for name, value in {"tokens": shard.tokens, **failure}.items()}


def describe(error: Exception, shard: str) -> str:
    """One line about a failure; what UserError says stays as it is."""
    if isinstance(error, UserError):
        return str(error)
    return f"scoring {shard} failed: {type(error).__name__}: {first_line(error)}"


def score_shards(task: ScoringTask, shards: list[ShardEntry], workers: Workers) -> Iterator[int]:
    """Score `shards` on the connected Ray cluster; yield the number of tokens of each as it is finished.

    Raises:
        UserError: what a worker failed with, in one line.
    """
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A row for each shard in a block of its own: blocks are what Ray hands to actors.
    rows = [{"shard": SHARD_ENTRY.dump_json(shard).decode()} for shard in shards]
    with warnings.catch_warnings(action="ignore"):  # of max_restarts, which has no other place yet
        outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            UnitScorer,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers.count),
            num_cpus=1,
            num_gpus=workers.gpus,
            max_restarts=0,  # Ray Data's default restarts a worker that dies for ever
        )
    try:
        for outcome in outcomes.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for tokens, error, trace in zip(outcome["tokens"], outcome["error"], outcome["traceback"], strict=True):
                if error:
                    raise UserError(str(error)) from RuntimeError(str(trace))
                yield int(tokens)
    except RayError as error:
        raise UserError(
            f"a scoring worker was lost ({type(error).__name__}: {first_line(error)}); if memory ran out, lower "
            "--batch_tokens or --workers; rerunning the same command continues"
        ) from error


@contextmanager
def ray_session(address: str | None, workers: Workers | None = None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or run Ray on this machine; shut down at the end what was started.

    Raises:
        UserError: no cluster at `address`.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT | os.environ)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            check_reachable(address)
            ray.init(address=address, **quiet)
        else:
            cpus = workers.count + 1 if workers else 2
            # One CPU more than the workers hold: Ray Data's own tasks need one, or the job waits for ever.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except Exception as error:  # a start that times out raises just that
        where = f"--ray_address {address}: cannot connect to Ray" if address else "Ray did not start"
        where += "; if it asks for a token, set RAY_AUTH_MODE=token" * bool(address)
        raise UserError(f"{where} ({first_line(error)})") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which aborts
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise OSError where nothing listens at `host:port`; Ray itself would try for many minutes."""
    if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((match[1], int(match[2])), timeout=10).close()


def check_resources(workers: Workers) -> None:
    """Raise UserError where the connected cluster can never place all workers, instead of waiting for ever."""
    total = ray.cluster_resources()
    needed = {"CPU": workers.count + 1, "GPU": int(np.ceil(workers.count * workers.gpus))}
    for resource, amount in needed.items():
        if total.get(resource, 0) < amount:
            raise UserError(
                f"--workers {workers.count}: needs {amount} {resource}s, the Ray cluster has "
                f"{total.get(resource, 0):g}; lower --workers or --tensor_parallel_size, or add nodes"
            )
