"""The two checkpoints of a scoring run, and Ray clusters whose nodes can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from network import Host
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.node import Node
from ray._raylet import Config
from ray.cluster_utils import Cluster

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.scoring.job.local_ray import ON_LOOPBACK

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 300.0


@pytest.fixture(scope="session")
def reference_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the reference."""
    return make_model(seed=0)


@pytest.fixture(scope="session")
def base_model(make_model: Callable[..., Path]) -> Path:
    """The checkpoint that plays the base."""
    return make_model(seed=1)


class Nodes:
    """A Ray cluster on this machine: a head without room for workers, and nodes."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address

    def add(self, cpus: int = 1) -> Node:
        return self.cluster.add_node(num_cpus=cpus)

    def kill(self, node: Node) -> None:
        """Let a node vanish with all its processes, as if its power failed."""
        raylet = node.all_processes["raylet"][0].process
        for process in [*psutil.Process(raylet.pid).children(recursive=True), raylet]:
            process.kill()
        raylet.wait()
        self.cluster.worker_nodes.discard(node)

    def wait_until_alone(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while len(self.cluster.global_state._live_node_ids()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill_gcs(self) -> None:
        gcs = self.cluster.head_node.all_processes["gcs_server"][0].process
        gcs.kill()
        gcs.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A cluster on loopback that asks for a token, as a Ray that is started by `wmtp score` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv(ON_LOOPBACK, "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        Config.initialize("")  # this process may have read another mode
        ensure_token_if_auth_enabled()
        nodes = Nodes()
        yield nodes
        nodes.cluster.shutdown()


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    """The cluster without nodes but its head, which takes 15 seconds to notice that a node was killed."""
    cluster.wait_until_alone()
    yield cluster
    for node in list(cluster.cluster.worker_nodes):
        cluster.cluster.remove_node(node)


def is_worker(process: int) -> bool:
    """Whether a process is a scoring worker, and not another one that got its number."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).name().startswith("ray::ScoringWor")
    return False


@dataclass
class Scoring:
    """A `wmtp score` in a process of its own, maybe on a host of its own, whose engines log which rows they score."""

    arguments: list[str]
    output: Path
    log: Path
    printed: Path
    environment: dict[str, str]
    seconds: float
    constants: dict[str, float]
    host: Host | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        driver = Path(__file__).parent / "job" / "logged_driver.py"
        settings = [self.log, self.seconds, json.dumps(self.constants)]
        command = [sys.executable, str(driver), *map(str, settings), "score", *self.arguments]
        if self.host:
            command = self.host.command(*command)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **self.environment}
        with self.printed.open("ab") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def running(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """All processes that it has started and that are alive."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True) if self.running() else []

    def child(self, name: str) -> psutil.Process | None:
        """A process of it whose name starts like that."""
        for process in self.children():
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(name):
                    return process
        return None

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait_until(self, condition: Callable[[], object], seconds: float = TIMEOUT) -> float:
        """Wait until a condition holds while the run goes on; return the seconds that took."""
        started = time.monotonic()
        while not condition():
            assert self.running(), f"ended too early: {self.lines()}"
            assert time.monotonic() - started < seconds, f"waited in vain: {self.lines()}"
            time.sleep(0.02)
        return time.monotonic() - started

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Wait for its end; return its exit status."""
        assert self.process is not None
        return self.process.wait(seconds)

    def scored(self) -> list[tuple[int, int]]:
        """Number of the row in the corpus, and process, of each time that a row was given to an engine."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(int(row), int(process)) for row, process in map(str.split, lines)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """No engine gets done meanwhile."""
        self.log.with_suffix(".hold").touch()
        yield
        self.log.with_suffix(".hold").unlink()

    @contextmanager
    def computing(self) -> Iterator[int]:
        """Inside the block, a worker computes one shard all the time; yields its process."""
        busy, computed = self.log.with_suffix(".busy"), self.log.with_suffix(".computed")
        computed.unlink(missing_ok=True)
        busy.touch()
        process = ""

        def is_written() -> bool:
            nonlocal process
            process = computed.read_text() if computed.exists() else ""
            return bool(process)

        self.wait_until(is_written)
        yield int(process)
        busy.unlink()

    def workers(self) -> set[int]:
        """Processes of workers that are alive."""
        return {process for _, process in self.scored() if is_worker(process)}

    def done(self) -> int:
        """How many shards are done in an unfinished run."""
        return len(list((self.output / PROGRESS).glob("*.parquet")))

    def lines(self) -> list[str]:
        """What it printed, without states of the progress bar that were overwritten."""
        text = self.printed.read_text()
        return [line for line in text.replace("\r", "\n").splitlines() if line.strip() and "shards" not in line]


@pytest.fixture
def many_tokens(make_shard_set: Callable[..., ShardSet]) -> Callable[[int], ShardSet]:
    """Make shards of four rows whose first two tokens are the number of the row in base 250."""

    def make(shards: int) -> ShardSet:
        rng = np.random.default_rng(0)
        sequences = rng.integers(0, 256, (4 * shards, 64))
        sequences[:, :2] = np.stack(np.divmod(np.arange(4 * shards), 250), axis=1)
        return make_shard_set(sequences.tolist(), name="many", rows_per_shard=4)

    return make


@pytest.fixture
def scoring(reference_model: Path, tmp_path: Path) -> Iterator[Callable[..., Scoring]]:
    """Describe a run of `wmtp score`; whatever is left of it at the end is killed."""
    made: list[Scoring] = []

    def make(
        tokens: ShardSet,
        *arguments: object,
        output: str = "scored",
        seconds: float = 0.1,
        environment: dict[str, str] | None = None,
        constants: dict[str, float] | None = None,
        host: Host | None = None,
    ) -> Scoring:
        settings = {"input": tokens.path, "output": tmp_path / output, "reference": reference_model}
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        name = f"{output}-{len(made)}"
        made.append(
            Scoring(
                [*flags, "--engine", "transformers", *map(str, arguments)],
                tmp_path / output,
                tmp_path / f"{name}.log",
                tmp_path / f"{name}.txt",
                environment or {},
                seconds,
                constants or {},
                host,
            )
        )
        return made[-1]

    yield make
    for run in made:
        if run.process is not None and run.running():
            run.kill()
