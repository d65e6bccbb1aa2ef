"""Several users and several jobs on one machine: nobody reaches into a job, and no job meets another."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from reach import LOOPBACK, named_files, named_sockets, open_ports, reachable

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.scoring.job.local_ray import ON_LOOPBACK

pytestmark = pytest.mark.slow
TENSOR_PARALLEL = ("--engine", "vllm", "--tensor_parallel_size", 2)
JOIN = """
import sys
from weighted_mtp.scoring.job.ray_cluster import ray_session
with ray_session(sys.argv[1]):
    pass
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary files that all users share, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o1777)
        yield Path(path)


def processes(run) -> list[psutil.Process]:
    return [psutil.Process(run.process.pid), *run.children()]


def address(run) -> str:
    """Where the Ray of a run listens."""
    arguments = run.child("raylet").cmdline()
    (found,) = (part.partition("=")[2] for part in arguments if part.startswith("--gcs-address="))
    return found


@pytest.mark.parametrize("engine", [("--engine", "transformers"), TENSOR_PARALLEL], ids=["transformers", "vllm"])
def test_other_users_reach_nothing(engine, request, scoring, many_tokens: Callable[[int], ShardSet], temporary):
    if "vllm" in engine:
        request.getfixturevalue("vllm_installed")
    run = scoring(many_tokens(2), *engine, seconds=0, environment={"TMPDIR": str(temporary)})
    with run.held():
        run.start()
        run.wait_until(run.scored)
        tree = processes(run)
        sockets = named_sockets(tree)
        files = named_files(tree, temporary, Path("/dev/shm"))
        (directory,) = temporary.iterdir()

        ports = open_ports(tree)
        assert "gcs_server" in ports.values()
        assert {ip for ip, _ in ports} <= LOOPBACK, ports
        (dashboard,) = (process for process in tree if any("dashboard.py" in part for part in process.cmdline()))
        assert not open_ports([dashboard])
        assert {"plasma_store", "raylet"} <= {path.name for path in sockets}
        assert all(path.is_relative_to(directory) for path in sockets), sockets
        assert directory.stat().st_mode & 0o777 == 0o700
        secret = run.child("gcs_server").environ()["RAY_AUTH_TOKEN"]
        assert not any(secret in " ".join(process.cmdline()) for process in tree)
        if os.getuid() == 0:
            environments = {Path(f"/proc/{process.pid}/environ") for process in tree}
            inside = {directory, *directory.rglob("*")}
            assert reachable(sockets | files | inside | environments) == set()
        for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}):
            join = [sys.executable, "-c", JOIN, address(run)]
            environment |= {ON_LOOPBACK: "0"}  # otherwise Ray looks for clusters on other addresses
            joined = subprocess.run(join, env=os.environ | environment, stderr=subprocess.PIPE, text=True, check=False)
            assert "Authentication token is missing or incorrect" in joined.stderr.splitlines()[-1]
    assert run.wait() == 0, run.lines()
    assert list(temporary.iterdir()) == []
    assert not any(path.exists() for path in files), "shared memory"
    if os.getuid() != 0:
        pytest.skip("all but one check passed: only root can try as another user")


def test_two_jobs_do_not_meet(scoring, many_tokens: Callable[[int], ShardSet], temporary):
    """The second starts in the middle of the first, told by its environment to join it, and goes on when it ends."""
    tokens = many_tokens(4)
    first = scoring(tokens, output="first", seconds=0, environment={"TMPDIR": str(temporary)})
    with first.held():
        first.start()
        first.wait_until(first.scored)
        joined = {"TMPDIR": str(temporary), "RAY_ADDRESS": address(first)}
        second = scoring(tokens, output="second", seconds=0, environment=joined)
        with second.held():
            second.start()
            second.wait_until(second.scored)
            directories = [run.child("gcs_server").environ()["RAY_TMPDIR"] for run in (first, second)]
            assert {str(path) for path in temporary.iterdir()} == {*directories}
            assert address(first) != address(second)
            first.log.with_suffix(".hold").unlink()
            assert first.wait() == 0, first.lines()
            assert [str(path) for path in temporary.iterdir()] == directories[1:]
        first.log.with_suffix(".hold").touch()
    assert second.wait() == 0, second.lines()
    assert list(temporary.iterdir()) == []
    for file in (first.output / DATA).glob("*.parquet"):
        assert (second.output / DATA / file.name).read_bytes() == file.read_bytes()
    assert [line for run in (first, second) for line in run.lines() if "lost" in line] == []
