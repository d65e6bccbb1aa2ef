"""Clusters whose nodes are on hosts of their own: links that are cut, lossy or slow, and a store that is far away."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree

import pytest
from network import Host, Network, running_network, why_no_network

from weighted_mtp.pipelines.score import run as run_score
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA, LOCK, PROGRESS
from weighted_mtp.schemas.storage.locations import walk_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(why_no_network() is not None, reason=f"no network of its own: {why_no_network()}"),
]
REPOSITORY = Path(__file__).parents[3]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
ROWS = 4
"""Rows of a shard."""


class RayHosts:
    """A Ray cluster: a head and a host for drivers, both without room for workers, and two hosts with room for one each."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, self.office, *self.workers = (network.add() for _ in range(4))
        self.address = f"{self.head.address}:6379"
        self.directories: list[Path] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_missing()

    def start_missing(self) -> None:
        """Start Ray on all hosts where it does not run, the head first."""
        for hosts in ([self.head], [self.office, *self.workers]):
            printed = [self._start(host) for host in hosts if not self._runs_on(host)]
            deadline = time.monotonic() + 120
            while not all("Ray runtime started" in file.read_text() for file in printed):
                assert time.monotonic() < deadline, [file.read_text() for file in printed]
                time.sleep(0.1)

    def _runs_on(self, host: Host) -> bool:
        return host.address in self.nodes and self.nodes[host.address].poll() is None

    def _start(self, host: Host) -> Path:
        host.kill_processes()
        directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # socket paths have at most 107 characters
        self.directories.append(directory)
        first = ["--head", "--port", 6379, "--include-dashboard", "false"]
        role = first if host is self.head else ["--address", self.address]
        sizes = ["--num-cpus", int(host in self.workers), "--object-store-memory", 80_000_000]
        quiet = ["--disable-usage-stats", "--include-log-monitor", "false"]
        start = ["start", "--block", "--node-ip-address", host.address, "--temp-dir", directory, *role, *sizes, *quiet]
        environment = {**os.environ, **TOKEN, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        command = host.command(sys.executable, "-m", "ray.scripts.scripts", *start)
        with (directory / "printed").open("wb") as file:
            self.nodes[host.address] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        return directory / "printed"


@pytest.fixture(scope="module")
def cluster_of_hosts() -> Iterator[RayHosts]:
    with running_network() as network:
        hosts = RayHosts(network)
        yield hosts
    for directory in hosts.directories:
        rmtree(directory)


@pytest.fixture
def hosts(cluster_of_hosts: RayHosts) -> RayHosts:
    """The cluster with good links and all its nodes."""
    for host in cluster_of_hosts.network.hosts.values():
        host.link.cut, host.link.loss = False, 0.0
    cluster_of_hosts.start_missing()
    return cluster_of_hosts


@pytest.fixture
def expected(
    score_here: list, reference_model: Path, tmp_path: Path
) -> Callable[[ShardSet], ShardSet]:
    """Score a set in this process, where nothing disturbs it."""

    def score(tokens: ShardSet) -> ShardSet:
        settings = {"input": tokens.path, "output": tmp_path / "expected", "reference": str(reference_model)}
        shards = run_score(ScoreConfig.model_validate(settings | {"engine": "transformers"}))
        assert shards is not None
        return shards

    return score


def assert_same(output: Path, expected: ShardSet) -> None:
    """A run has ended with the bytes of another one, and left nothing else."""
    scored = ShardSet.open(output)
    assert scored.manifest.shards == expected.manifest.shards
    assert walk_files(output).keys() == walk_files(expected.path).keys()
    for shard in expected.manifest.shards:
        assert (output / DATA / shard.name).read_bytes() == (expected.path / DATA / shard.name).read_bytes()


def commits(output: Path) -> dict[str, tuple[int, int]]:
    """Identity of each committed shard: another one of the same name has a different one."""
    found = {file.name: file.stat() for file in (output / DATA).glob("*.parquet")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def test_loss_of_packets(hosts, scoring, many_tokens, expected):
    tokens = many_tokens(40)
    for host in hosts.network.hosts.values():
        host.link.loss = 0.05
    run = scoring(tokens, "--ray_address", hosts.address, "--workers", 2, host=hosts.office, environment=TOKEN)
    run.start()
    assert run.wait() == 0, run.lines()
    assert_same(run.output, expected(tokens))
    assert len(run.scored()) == 40 * ROWS


def test_link_of_a_worker_is_cut_for_20_seconds(hosts, scoring, many_tokens, expected):
    tokens = many_tokens(100)
    settings = ("--ray_address", hosts.address, "--workers", 2, "--min_workers", 1)
    run = scoring(tokens, *settings, seconds=0.5, host=hosts.office, environment=TOKEN)
    run.start()
    run.wait_until(lambda: run.done() > 3 and len(run.workers()) == 2)
    hosts.workers[0].link.cut = True
    before = commits(run.output)
    time.sleep(20)
    hosts.workers[0].link.cut = False
    assert run.wait() == 0, run.lines()
    print(run.lines(), len(run.scored()))
    assert_same(run.output, expected(tokens))
    assert before.items() <= commits(run.output).items()
    assert len(run.scored()) <= (100 + 2) * ROWS, "the worker had two shards"
