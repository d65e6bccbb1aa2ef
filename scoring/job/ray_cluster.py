"""Ray: connecting to a cluster or running it on this machine, and what workers need of it."""

import logging
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from textwrap import shorten

import ray
from ray._private import ray_constants, services, worker
from ray.exceptions import RayError, RayTaskError

from weighted_mtp.schemas.errors import UserError, first_line

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # on cores shared with anything else, spinning threads cost a factor of five
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in this environment however the driver was started
}
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray takes no part in clusters and binds all its ports to loopback, as it does on those systems."""


@dataclass(frozen=True)
class Pool:
    """How many workers a job may have, how many it must, and what each of them takes.

    `gpus` may be a share of one GPU, or several whole ones on one node.
    """

    most: int
    least: int
    cpus: float
    gpus: float

    @classmethod
    def plan(
        cls,
        workers: int,
        *,
        least: int | None,
        cpus: float,
        gpus_per_worker: float | None,
        gpus: int,
        tensor_parallel_size: int,
    ) -> "Pool":
        """Place workers evenly on `gpus` GPUs; by default as many as these hold, or one on the CPU.

        Args:
            workers: how many at most; 0 is the default.
            least: how many must fit at the start; None is all of them.
            cpus: CPUs of a worker.
            gpus_per_worker: GPUs of a worker; None is one, several for tensor parallel, or a share if workers outnumber
                the GPUs.
            gpus: GPUs there are; 0 if the engine does not use any.
            tensor_parallel_size: GPUs that share one model.
        """
        if not gpus:
            share = 0.0
            count = workers or 1
        elif gpus_per_worker or tensor_parallel_size > 1:
            share = gpus_per_worker or float(tensor_parallel_size)
            count = workers or max(1, math.floor(gpus / share))
        else:
            count = workers or gpus
            share = 1 / -(-count // gpus)
        return cls(count, count if least is None else min(least, count), cpus, share)

    def for_units(self, units: int) -> "Pool":
        """The pool without workers that would have nothing to do."""
        return replace(self, most=min(self.most, units), least=min(self.least, units))

    def needs(self) -> str:
        """What a worker takes, in words."""
        return f"{self.cpus:g} CPUs" + f" and {self.gpus:g} GPUs" * bool(self.gpus)

    def places(self) -> int:
        """How many workers the nodes of the connected cluster can hold when nothing else runs there."""
        return sum(self.places_on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def places_on(self, resources: dict[str, float]) -> int:
        """How many workers a node with these resources can hold; a share of a GPU is a share of one GPU."""
        by_cpu = math.floor(resources.get("CPU", 0) / self.cpus + 1e-9)
        if not self.gpus:
            return by_cpu
        gpus = resources.get("GPU", 0)
        by_gpu = int(gpus) * math.floor(1 / self.gpus + 1e-9) if self.gpus < 1 else math.floor(gpus / self.gpus)
        return min(by_cpu, by_gpu)

    def check(self) -> None:
        """Raise UserError where the connected cluster cannot hold the workers that there must be."""
        places = self.places()
        if places < self.least:
            raise UserError(
                f"--workers {self.least}: each needs {self.needs()} on one node, and the Ray cluster "
                f"({describe_nodes()}) can hold {places}; lower --workers, --cpus_per_worker, --gpus_per_worker or "
                "--tensor_parallel_size, set --min_workers, or add nodes"
            )


def describe_nodes() -> str:
    """The resources of each node of the connected cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    described = [f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes]
    return "; ".join(described[:8] + ["..."] * (len(described) > 8)) or "no nodes"


@contextmanager
def ray_session(address: str | None, pool: Pool | None = None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or run Ray on this machine; shut down at the end what was started.

    A Ray of this machine has a place for every worker, no dashboard, and all ports on loopback.

    Raises:
        UserError: no cluster at `address`.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT | os.environ)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    worker.listen_error_messages = lambda *_: None  # pages about dead nodes, on stdout; the job says it in a line
    try:
        if address:
            check_reachable(services.canonicalize_bootstrap_address(address))
            ray_constants.NUM_REDIS_GET_RETRIES = 1  # of 40 seconds each
            with silent_stderr():
                ray.init(address=address, **quiet)
        else:
            os.environ[ON_LOOPBACK] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False  # the same for this process, which has read it already
            cpus = math.ceil(pool.most * pool.cpus) if pool else 1
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # a start that times out raises just that
        where = f"--ray_address {address}: cannot connect to Ray" if address else "Ray did not start"
        where += "; if it asks for a token, set RAY_AUTH_MODE=token" * bool(address)
        raise UserError(f"{where} ({last_reason(error)})") from error
    except SystemExit as error:
        raise KeyboardInterrupt from error  # what Ray makes of SIGTERM
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Keep from the terminal what the parts of Ray that are not Python write there while they connect."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def last_reason(error: BaseException) -> str:
    """The reason at the root of an exception, in one line; Ray hides it behind others or below a traceback."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)


def cause_of_death(error: RayError) -> str:
    """Why a worker did not answer, in one line: Ray says it below its first line and the details of the actor."""
    if "worker process has died" in str(error):
        return "its process died: killed, crashed, or out of memory"
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        return last_reason(error)
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return shorten(lines[min(1, len(lines) - 1)], 200, placeholder="...") if lines else type(error).__name__


def node_died(error: RayError) -> bool:
    """Whether a worker did not answer because its node is gone."""
    return "its node has died" in str(error) and not isinstance(error, RayTaskError)


def head_answers() -> bool:
    """Whether the head of the connected cluster takes connections; without it, Ray ends this process after a minute."""
    try:
        check_reachable(ray.get_runtime_context().gcs_address)
    except OSError:
        return False
    return True


def check_reachable(address: str) -> None:
    """Raise OSError where nothing listens at `host:port`; Ray itself would try for many minutes."""
    if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
