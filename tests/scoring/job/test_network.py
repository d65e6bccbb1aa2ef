"""Clusters whose nodes are on hosts of their own: links that are cut, lossy or slow, and a store that is far away."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from math import inf
from pathlib import Path

import pytest
from network import Host, Network, running_network, why_no_network

from weighted_mtp.pipelines.score import run as run_score
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.schemas.storage.locations import walk_files
from weighted_mtp.scoring.job.fleet import HEAD_SECONDS
from weighted_mtp.scoring.job.local_ray import ON_LOOPBACK

pytestmark = [pytest.mark.slow, pytest.mark.integration]
REPOSITORY = Path(__file__).parents[3]
ROWS = 4
"""Rows of a shard."""
HEAD_PORT, NODE_PORT, OBJECT_PORT, STORE_PORT = 6379, 6380, 6381, 9000
WORKER_PORTS = range(10002, 10100)
"""All ports that hosts accept connections at, as the documentation of scoring names them."""


class Store:
    """A server of S3 on a host of its own, with a bucket that keeps all versions of its objects."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host.address}:{STORE_PORT}",
            "AWS_ACCESS_KEY_ID": "name",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        command = host.command(sys.executable, "-m", "moto.server", "-H", host.address, "-p", STORE_PORT)
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._run(MAKE_BUCKET)

    def _run(self, script: str, *arguments: object) -> str:
        command = self.host.command(sys.executable, "-c", script, *arguments)
        return subprocess.run(command, env=os.environ | self.environment, check=True, stdout=subprocess.PIPE).stdout

    def fetch(self, name: str, target: Path) -> dict[str, int]:
        """Copy a directory of the bucket; return how often each of its objects has been written."""
        return json.loads(self._run(FETCH, name, target))


MAKE_BUCKET = """
import time, s3fs
for _ in range(600):
    try:
        s3fs.S3FileSystem().mkdir("bucket")
        break
    except OSError:
        time.sleep(0.1)
s3fs.S3FileSystem().make_bucket_versioned("bucket")
"""
FETCH = """
import collections, json, sys, s3fs
name, target = sys.argv[1:]
files = s3fs.S3FileSystem()
files.get(f"bucket/{name}", target, recursive=True)
answer = files.call_s3("list_object_versions", Bucket="bucket", Prefix=f"{name}/")
assert not answer["IsTruncated"]
print(json.dumps(collections.Counter(version["Key"].removeprefix(f"{name}/") for version in answer["Versions"])))
"""


class RayHosts:
    """A Ray cluster: a head and a host for drivers, both without room for workers, and two hosts with room for one.

    It uses a store on a host outside the cluster. `environment` is that of all nodes and drivers.
    """

    def __init__(self, network: Network, directory: Path) -> None:
        self.network = network
        self.directory = directory
        self.starts = count()
        self.store = Store(network.add())
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "f" * 64,
            ON_LOOPBACK: "1",
            **self.store.environment,
        }
        self.head, self.office, *self.workers = (network.add() for _ in range(4))
        self.address = f"{self.head.address}:{HEAD_PORT}"
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
        directory = self.directory / str(next(self.starts))
        directory.mkdir()
        first = ["--head", "--port", HEAD_PORT, "--include-dashboard", "false"]
        ports = ["--node-manager-port", NODE_PORT, "--object-manager-port", OBJECT_PORT]
        ports += ["--min-worker-port", WORKER_PORTS[0], "--max-worker-port", WORKER_PORTS[-1]]
        role = first if host is self.head else ["--address", self.address]
        sizes = ["--num-cpus", int(host in self.workers), "--object-store-memory", 80_000_000]
        quiet = ["--disable-usage-stats", "--include-log-monitor", "false"]
        own = ["--node-ip-address", host.address, "--temp-dir", directory]
        start = ["start", "--block", *own, *role, *ports, *sizes, *quiet]
        environment = {**os.environ, **self.environment, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        command = host.command(sys.executable, "-m", "ray.scripts.scripts", *start)
        with (directory / "printed").open("wb") as file:
            self.nodes[host.address] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        return directory / "printed"

    def stop(self) -> None:
        for process in (self.store.server, *self.nodes.values()):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster_of_hosts() -> Iterator[RayHosts]:
    if reason := why_no_network():
        pytest.skip(reason)
    ports = {HEAD_PORT, NODE_PORT, OBJECT_PORT, STORE_PORT, *WORKER_PORTS}
    # The paths of Ray's sockets have at most 107 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, running_network(ports) as network:
        hosts = RayHosts(network, Path(directory))
        yield hosts
        hosts.stop()


@pytest.fixture
def hosts(cluster_of_hosts: RayHosts) -> RayHosts:
    """The cluster with good links and all its nodes."""
    for host in cluster_of_hosts.network.hosts.values():
        host.link.cut, host.link.loss, host.link.delay, host.link.rate = False, 0.0, 0.0, inf
    cluster_of_hosts.start_missing()
    return cluster_of_hosts


@pytest.fixture
def expected(score_here: list, reference_model: Path, tmp_path: Path) -> Callable[[ShardSet], ShardSet]:
    """Score a set in this process, where nothing disturbs it."""

    def score(tokens: ShardSet) -> ShardSet:
        settings = {"input": tokens.path, "output": tmp_path / "expected", "reference": str(reference_model)}
        shards = run_score(ScoreConfig.model_validate(settings | {"engine": "transformers"}))
        assert shards is not None
        return shards

    return score


def assert_same(output: Path, expected: ShardSet) -> None:
    """The set has the bytes of another one, and there is nothing else in its directory."""
    scored = ShardSet.open(output)
    assert scored.manifest.shards == expected.manifest.shards
    assert walk_files(output).keys() == walk_files(expected.path).keys()
    for shard in expected.manifest.shards:
        assert (output / DATA / shard.name).read_bytes() == (expected.path / DATA / shard.name).read_bytes()


def commits(output: Path) -> dict[str, tuple[int, int]]:
    """Identity of each committed shard: another one of the same name has a different one."""
    found = {file.name: file.stat() for file in (output / DATA).glob("*.parquet")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.fixture
def start_score(hosts: RayHosts, scoring: Callable) -> Callable:
    """Start a run whose shards take half a second or more; `address` is an output in the store."""

    def start(tokens: ShardSet, host: Host, *, output: str, address: str | None = None, workers: int = 2):
        flags = ["--ray_address", hosts.address, "--workers", workers, "--min_workers", 1]
        flags += ["--output", address] if address else []
        run = scoring(tokens, *flags, output=output, seconds=0.5, host=host, environment=hosts.environment)
        run.start()
        return run

    return start


def assert_stopped(run, reason: str) -> None:
    """A run ends by itself, and its last line says why."""
    assert run.wait() in (1, 130), run.lines()
    assert re.search(reason, run.lines()[-1]), run.lines()
    assert run.printed.read_text().count("error: ") <= 1, run.lines()
    assert "Traceback" not in run.printed.read_text()


def scored_on(host: Host, run) -> bool:
    """Whether a worker of a run has been given a shard on a host."""
    return not host.processes("ray::ScoringWor").isdisjoint(process for _, process in run.scored())


def test_loss_of_packets(hosts, start_score, many_tokens, expected):
    tokens = many_tokens(30)
    for host in hosts.network.hosts.values():
        host.link.loss = 0.05
    run = start_score(tokens, hosts.office, output="scored")
    assert run.wait() == 0, run.lines()
    assert_same(run.output, expected(tokens))
    assert len(run.scored()) == 30 * ROWS


def test_slow_link_to_the_store(hosts, start_score, many_tokens, expected, tmp_path):
    """1 Mbit/s, and 200 milliseconds to the store and back."""
    tokens = many_tokens(8)
    hosts.store.host.link.delay, hosts.store.host.link.rate = 0.1, 1e6 / 8
    run = start_score(tokens, hosts.office, output="slow", address="s3://bucket/slow")
    assert run.wait() == 0, run.lines()
    written = hosts.store.fetch("slow", tmp_path / "fetched")
    assert_same(tmp_path / "fetched", expected(tokens))
    assert {written[f"{DATA}/{shard.name}"] for shard in tokens.manifest.shards} == {1}
    assert len(run.scored()) == 8 * ROWS


def test_link_of_a_worker_is_cut_for_20_seconds(hosts, start_score, many_tokens, expected):
    tokens = many_tokens(100)
    run = start_score(tokens, hosts.office, output="scored")
    run.wait_until(lambda: run.done() > 3 and scored_on(hosts.workers[0], run))
    hosts.workers[0].link.cut = True
    before = commits(run.output)
    time.sleep(20)
    hosts.workers[0].link.cut = False
    assert run.wait() == 0, run.lines()
    assert_same(run.output, expected(tokens))
    assert before.items() <= commits(run.output).items()
    assert len(run.scored()) <= (100 + 2) * ROWS, "the worker had two shards"


def test_links_of_workers_are_cut_for_five_minutes(hosts, start_score, many_tokens, expected):
    """The link of one, while a run goes on with the other; then that of the other, too, which stops a run."""
    tokens = many_tokens(60)
    first = start_score(tokens, hosts.office, output="first")
    first.wait_until(lambda: first.done() > 3 and scored_on(hosts.workers[0], first))
    hosts.workers[0].link.cut = True
    mended_at = time.monotonic() + 300
    assert first.wait() == 0, first.lines()
    shards_of_first = commits(first.output)

    second = start_score(tokens, hosts.head, output="second")
    second.wait_until(lambda: second.done() > 3)
    hosts.workers[1].link.cut = True
    assert_stopped(second, r"no node of the Ray cluster \(0 CPUs, .*\) can hold a worker any more")
    shards_of_second = commits(second.output)
    time.sleep(max(0.0, mended_at - time.monotonic()))
    for host in hosts.workers:
        host.link.cut = False
        hosts.nodes[host.address].wait(120)  # it ends when it finds that the cluster takes it for dead
    hosts.start_missing()
    second.start()
    assert second.wait() == 0, second.lines()
    for run, shards in ((first, shards_of_first), (second, shards_of_second)):
        assert_same(run.output, expected(tokens))
        assert shards.items() <= commits(run.output).items()


def test_drivers_are_cut_off(hosts, start_score, many_tokens, expected, tmp_path):
    """From the head and from the store. Another driver takes over in the store before the first one comes back."""
    tokens = many_tokens(60)
    on_disk = start_score(tokens, hosts.office, output="disk", workers=1)
    first = start_score(tokens, hosts.office, output="first", address="s3://bucket/taken-over", workers=1)
    for run in (on_disk, first):
        run.wait_until(lambda run=run: len(run.scored()) > 10 * ROWS)
    hosts.office.link.cut = True
    shards_on_disk = commits(on_disk.output)
    second = start_score(tokens, hosts.head, output="second", address="s3://bucket/taken-over", workers=1)
    time.sleep(HEAD_SECONDS + 20)
    hosts.office.link.cut = False
    assert_stopped(on_disk, "the head of the Ray cluster no longer answers; .* rerun the same command to continue")
    assert_stopped(first, "no longer answers|interrupted; rerun the same command|another run has taken over its lock")
    again = start_score(tokens, hosts.head, output="disk", workers=1)  # Ray may take the node in the office for dead
    for run in (again, second):
        assert run.wait() == 0, run.lines()
    assert shards_on_disk.items() <= commits(again.output).items()
    written = hosts.store.fetch("taken-over", tmp_path / "fetched")
    assert {written[f"{DATA}/{shard.name}"] for shard in tokens.manifest.shards} == {1}
    for output in (again.output, tmp_path / "fetched"):
        assert_same(output, expected(tokens))


def test_driver_on_a_host_without_ray(hosts, start_score, many_tokens):
    run = start_score(many_tokens(1), hosts.store.host, output="scored")
    assert_stopped(run, "--ray_address .*: cannot connect to Ray: this machine is no node of the cluster; join it")
