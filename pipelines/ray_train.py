"""`wmtp train --ray_workers`: the same training run, in workers that Ray Train places and starts.

What the first worker writes to the terminal and how the run ends go through an actor, since Ray keeps the output of
workers in files. A worker that dies ends its group; a new group continues from the last checkpoint.
"""

import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from textwrap import shorten
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from weighted_mtp.pipelines.cli.errors import debugging, describe, is_for_users, quieten_libraries
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.job.ray_cluster import count_places, describe_nodes, last_reason, ray_session
from weighted_mtp.scoring.job.worker_pool import WorkerPool
from weighted_mtp.training.run.train import train

RESTARTS = 3
"""How often a run starts its workers again before it gives up."""
POLL_SECONDS = 0.2


class Desk:
    """Holds what workers have to say until the driver takes it. An actor."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str]] = []
        self.outcome: dict[str, Any] = {}

    def write(self, stream: str, text: str) -> None:
        """Keep text that belongs on the driver's `stdout` or `stderr`."""
        self.written.append((stream, text))

    def take(self) -> list[tuple[str, str]]:
        """What was written since the last call."""
        taken, self.written = self.written, []
        return taken

    def finish(self, **outcome: Any) -> None:
        """Keep how the run ended, a `summary` or an `error`; the first one counts."""
        self.outcome = self.outcome or outcome

    def ended(self) -> dict[str, Any]:
        """What `finish` was given; empty if nothing."""
        return self.outcome


class Forwarded(io.TextIOBase):
    """A text stream whose content goes to a desk."""

    def __init__(self, desk: Any, name: str) -> None:
        self.desk = desk
        self.name = name

    def write(self, text: str) -> int:
        """Send text on its way without waiting for it."""
        self.desk.write.remote(self.name, text)
        return len(text)


def train_on_ray(config: TrainConfig) -> dict[str, Any]:
    """Train with `config.ray_workers` workers on Ray, one process each, and return the summary of the run.

    Raises:
        UserError: the cluster is too small, a worker reported one, or workers kept dying.
    """
    assert config.ray_workers is not None
    with ray_session(config.ray_address, WorkerPool(config.ray_workers, config.ray_workers, cpus=1, gpus=0)):
        scaling = place_workers(config.ray_workers)
        desk = ray.remote(num_cpus=0)(Desk).remote()
        job = {"config": config.model_dump_json(), "desk": desk, "directory": os.getcwd()}
        reason = "it said nothing"
        for restart in range(RESTARTS + 1):
            try:
                with tempfile.TemporaryDirectory() as scratch, printing(desk):
                    run_group(job, scaling, scratch)
            except TrainingFailedError as error:
                reason = why(error)
            ended = ray.get(desk.ended.remote())
            if "error" in ended:
                raise UserError(ended["error"])
            if "summary" in ended:
                return dict(ended["summary"])
            if restart < RESTARTS:
                print(
                    f"wmtp train: a worker failed ({reason}); continuing, {restart + 1} of {RESTARTS}", file=sys.stderr
                )
    raise UserError(
        f"--ray_workers {config.ray_workers}: workers failed {RESTARTS + 1} times ({reason}); rerun to continue"
    )


def why(error: TrainingFailedError) -> str:
    """The reason of a failure in one line."""
    died = "its process died: killed, crashed, or out of memory"
    return died if "process has died" in str(error) else shorten(last_reason(error), 200, placeholder="...")


def place_workers(workers: int) -> ScalingConfig:
    """One CPU for each worker and, where the cluster has GPUs, one of these, too.

    Raises:
        UserError: the cluster cannot hold them.
    """
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    pool = WorkerPool(workers, workers, cpus=1, gpus=float(use_gpu))
    if count_places(pool) < workers:
        raise UserError(
            f"--ray_workers {workers}: each needs {pool.needs()}, and the Ray cluster ({describe_nodes()}) can hold "
            f"{count_places(pool)}; lower --ray_workers or add nodes"
        )
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu)


def run_group(job: dict[str, Any], scaling: ScalingConfig, scratch: str) -> None:
    """Run one group of workers to its end.

    Raises:
        TrainingFailedError: a worker raised or died.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=scaling,
        run_config=RunConfig(
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    ).fit()


@contextmanager
def printing(desk: Any) -> Iterator[None]:
    """Print what comes to the desk while the block runs."""
    done = threading.Event()

    def print_new() -> None:
        for stream, text in ray.get(desk.take.remote()):
            print(text, end="", file=getattr(sys, stream), flush=True)

    def keep_printing() -> None:
        while not done.wait(POLL_SECONDS):
            print_new()

    printer = threading.Thread(target=keep_printing, daemon=True)
    printer.start()
    try:
        yield
    finally:
        done.set()
        printer.join()
        print_new()


def train_worker(job: dict[str, Any]) -> None:
    """Train in one worker; the first one has the driver's terminal and says how the run ended."""
    if not debugging():
        quieten_libraries()
    os.chdir(job["directory"])  # settings may hold relative paths
    desk = job["desk"]
    config = TrainConfig.model_validate_json(job["config"])
    first = os.environ["RANK"] == "0"
    with ExitStack() as stack:
        if first:
            stack.enter_context(redirect_stdout(Forwarded(desk, "stdout")))
            stack.enter_context(redirect_stderr(Forwarded(desk, "stderr")))
        try:
            summary = train(config)
        except Exception as error:
            if is_for_users(error):
                ray.get(desk.finish.remote(error=describe(error, config)))
            raise
    if first:
        ray.get(desk.finish.remote(summary=summary))
