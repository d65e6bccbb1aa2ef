"""`wmtp train --ray_workers`: training in worker processes started by Ray Train.

Ray writes the output of workers to files. An actor therefore sends the first worker's output and the outcome of the
run to the driver. If a worker dies, its group stops, and a new group continues from the last checkpoint.
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

from weighted_mtp.pipelines.cli.errors import (
    debugging,
    describe_error,
    is_user_facing,
    show_messages,
    silence_libraries,
)
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.scoring.job.ray_cluster import count_places, describe_nodes, last_reason, ray_session
from weighted_mtp.scoring.job.worker_pool import WorkerPool
from weighted_mtp.training.run.train import train

RESTARTS = 3
"""Maximum number of times a run restarts its workers."""
POLL_SECONDS = 0.2


class DriverOutput:
    """Actor that buffers worker output and the outcome of the run for the driver."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str]] = []
        self.result: dict[str, Any] = {}

    def write(self, stream: str, text: str) -> None:
        """Buffer text for `stdout` or `stderr` of the driver."""
        self.written.append((stream, text))

    def take(self) -> list[tuple[str, str]]:
        """Return the text written since the last call."""
        taken, self.written = self.written, []
        return taken

    def finish(self, **result: Any) -> None:
        """Store the outcome of the run, a `summary` or an `error`. The first call wins."""
        self.result = self.result or result

    def outcome(self) -> dict[str, Any]:
        """The outcome passed to `finish`; empty before."""
        return self.result


class ForwardedStream(io.TextIOBase):
    """A text stream to a `DriverOutput`. It is a terminal if the driver's stream is one."""

    def __init__(self, output: Any, name: str, terminal: bool) -> None:
        self.output = output
        self.name = name
        self.terminal = terminal

    def write(self, text: str) -> int:
        """Send text without waiting for delivery."""
        self.output.write.remote(self.name, text)
        return len(text)

    def isatty(self) -> bool:
        """Whether the driver prints to a terminal; used by progress bars and tables."""
        return self.terminal


def train_on_ray(config: TrainConfig) -> dict[str, Any]:
    """Train with `config.ray_workers` workers on Ray, one process each, and return the summary of the run.

    Raises:
        UserError: the cluster is too small, a worker raised UserError, or workers kept dying.
    """
    assert config.ray_workers is not None
    with ray_session(config.ray_address, WorkerPool(config.ray_workers, config.ray_workers, cpus=1, gpus=0)):
        scaling = place_workers(config.ray_workers)
        output = ray.remote(num_cpus=0)(DriverOutput).remote()
        job = {
            "config": config.model_dump_json(),
            "output": output,
            "directory": os.getcwd(),
            "terminals": {name: getattr(sys, name).isatty() for name in ("stdout", "stderr")},
        }
        reason = "no reason given"
        for restart in range(RESTARTS + 1):
            try:
                with tempfile.TemporaryDirectory() as scratch, printing(output):
                    run_group(job, scaling, scratch)
            except TrainingFailedError as error:
                reason = failure_reason(error)
            outcome = ray.get(output.outcome.remote())
            if "error" in outcome:
                raise UserError(outcome["error"])
            if "summary" in outcome:
                return dict(outcome["summary"])
            if restart < RESTARTS:
                print(
                    f"wmtp train: a worker failed ({reason}); continuing, {restart + 1} of {RESTARTS}", file=sys.stderr
                )
    raise UserError(
        f"--ray_workers {config.ray_workers}: workers failed {RESTARTS + 1} times ({reason}); rerun to continue"
    )


def failure_reason(error: TrainingFailedError) -> str:
    """The reason for a failure in one line."""
    died = "its process died: killed, crashed, or out of memory"
    return died if "process has died" in str(error) else shorten(last_reason(error), 200, placeholder="...")


def place_workers(workers: int) -> ScalingConfig:
    """Give each worker one CPU and, if the cluster has GPUs, one GPU.

    Raises:
        UserError: the cluster is too small for the workers.
    """
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    pool = WorkerPool(workers, workers, cpus=1, gpus=float(use_gpu))
    if count_places(pool) < workers:
        raise UserError(
            f"--ray_workers {workers}: each needs {pool.needs()}, and the Ray cluster ({describe_nodes()}) can hold "
            f"{count_places(pool)}; lower --ray_workers or add nodes"
        )
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu)


class Trainer(TorchTrainer):
    """A trainer that leaves the handling of SIGINT to this process. Ray's own would end the run without an error."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def run_group(job: dict[str, Any], scaling: ScalingConfig, scratch: str) -> None:
    """Run one group of workers until it ends.

    Raises:
        TrainingFailedError: a worker raised or died.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    Trainer(
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
def printing(output: Any) -> Iterator[None]:
    """While the block runs, print text received by a `DriverOutput`."""
    done = threading.Event()

    def print_new() -> None:
        for stream, text in ray.get(output.take.remote()):
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
    """Train in one worker. The first worker prints on the driver's terminal and reports the outcome."""
    if not debugging():
        silence_libraries()
    show_messages()
    os.chdir(job["directory"])  # settings may hold relative paths
    output, terminals = job["output"], job["terminals"]
    config = TrainConfig.model_validate_json(job["config"])
    first = os.environ["RANK"] == "0"
    with ExitStack() as stack:
        if first:
            stack.enter_context(redirect_stdout(ForwardedStream(output, "stdout", terminals["stdout"])))
            stack.enter_context(redirect_stderr(ForwardedStream(output, "stderr", terminals["stderr"])))
        try:
            summary = train(config, ProgressBar)
        except Exception as error:
            if is_user_facing(error):
                ray.get(output.finish.remote(error=describe_error(error, config)))
            raise
    if first:
        ray.get(output.finish.remote(summary=summary))
