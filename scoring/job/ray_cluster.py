"""Ray: connecting to a cluster or starting one on this machine, its resources, and causes of worker deaths."""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import shorten

import psutil
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants, services, utils, worker
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from weighted_mtp.schemas.errors import SHORTER_PATH, UserError, first_line, is_socket_path_error
from weighted_mtp.schemas.interruption import Interruption
from weighted_mtp.scoring.job.addresses import check_reachable
from weighted_mtp.scoring.job.local_ray import private_surroundings
from weighted_mtp.scoring.job.worker_pool import WorkerPool

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads on shared cores cost a factor of five
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment even under `uv run`
}
KILL_SECONDS = 1.0
"""Longest wait for killed processes to end. In a container where nothing reaps them they remain as zombies."""


def count_places(pool: WorkerPool) -> int:
    """Number of workers that the nodes of the connected cluster can hold when idle."""
    return sum(pool.places_on(node["Resources"]) for node in ray.nodes() if node["Alive"])


def check_places(pool: WorkerPool) -> None:
    """Raise UserError if the connected cluster cannot hold `pool.min_workers` workers."""
    places = count_places(pool)
    if places < pool.min_workers:
        raise UserError(
            f"--workers {pool.min_workers}: each needs {pool.needs()} on one node, and the Ray cluster "
            f"({describe_nodes()}) can hold {places}; lower --workers, --cpus_per_worker, --gpus_per_worker or "
            "--tensor_parallel_size, set --min_workers, or add nodes"
        )


def describe_nodes() -> str:
    """The resources of each node of the connected cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    described = [f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes]
    return "; ".join(described[:8] + ["..."] * (len(described) > 8)) or "no nodes"


@contextmanager
def ray_session(address: str | None, pool: WorkerPool | None = None) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start Ray on this machine; disconnect or shut down at the end.

    Does nothing if Ray is already connected. Ray on this machine has room for every worker of `pool`, no dashboard, and
    serves this process only (see `scoring.job.local_ray`).

    Raises:
        UserError: no cluster at `address`.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(ENVIRONMENT | os.environ)
    with nullcontext() if address else private_surroundings():
        try:
            start_ray(address, pool)
            yield
        finally:
            stop_ray()


def start_ray(address: str | None, pool: WorkerPool | None) -> None:
    """Connect to the Ray cluster at `address`, or start Ray on this machine. Interruptions wait meanwhile.

    Raises:
        UserError: no cluster at `address`, or Ray does not start.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    worker.listen_error_messages = lambda *_: None  # prints pages about dead nodes; the job reports one line
    utils.set_sigterm_handler = lambda _: None  # Ray would replace the handler of this process
    try:
        if address:
            check_reachable(services.canonicalize_bootstrap_address(address))
            ray_constants.NUM_REDIS_GET_RETRIES = 1  # of 40 seconds each
            with silent_stderr(), Interruption(deferred=True):
                ray.init(address=address, **quiet)
        else:
            cpus = math.ceil(pool.max_workers * pool.cpus) if pool else 1
            with silent_stderr(), Interruption(deferred=True):
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:  # a start that times out raises a bare Exception
        if is_socket_path_error(error):
            raise UserError(f"{Path(get_default_system_temp_dir()).parent}: {SHORTER_PATH}") from error
        where = f"--ray_address {address}: cannot connect to Ray" if address else "Ray did not start"
        reason = last_reason(error)
        if "No node info found" in reason:
            raise UserError(
                f"{where}: this machine is no node of the cluster; join it with 'ray start --address {address}'"
            ) from error
        where += "; if it requires a token, set RAY_AUTH_MODE=token" * bool(address)
        remedy = "; use a working directory and a TMPDIR with names in UTF-8" * ("surrogates not allowed" in reason)
        raise UserError(f"{where} ({reason}){remedy}") from error


def stop_ray() -> None:
    """Disconnect from Ray. If this process started it, end its processes: agents outlive their raylet by seconds."""
    node = worker._global_node
    started = [info.process.pid for infos in node.all_processes.values() for info in infos] if node else []
    processes: list[psutil.Process] = []
    for pid in started:
        with suppress(psutil.NoSuchProcess):
            processes += psutil.Process(pid).children(recursive=True)
    ray.shutdown()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, KILL_SECONDS)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Suppress stderr at the level of file descriptors. Ray's C++ code writes there, also if a signal comes."""
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
    """Root cause of an exception in one line. Ray chains other exceptions to it or prints it below a traceback."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)


def cause_of_death(error: RayError) -> str:
    """Cause of a worker's death in one line. Ray states it below the first line and the details of the actor."""
    if "worker process has died" in str(error):
        return "its process died: killed, crashed, or out of memory"
    if isinstance(error, ActorUnavailableError):
        return "the connection to it broke"
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        return last_reason(error)
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return shorten(lines[min(1, len(lines) - 1)], 200, placeholder="...") if lines else type(error).__name__


def host_lost(error: RayError) -> bool:
    """Whether a worker's node died, or the connection to the worker broke: no failure of the worker itself."""
    died = "its node has died" in str(error) and not isinstance(error, RayTaskError)
    return died or isinstance(error, ActorUnavailableError)


def head_answers() -> bool:
    """Whether the head of the connected cluster accepts connections; without it, Ray ends this process in a minute."""
    try:
        check_reachable(ray.get_runtime_context().gcs_address)
    except OSError:
        return False
    return True
