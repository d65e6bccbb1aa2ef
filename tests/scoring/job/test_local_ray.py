"""The Ray that `wmtp score` starts on this machine: its surroundings, and what is left of it when anything dies."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.scoring.job.local_ray import PREFIX, private_surroundings, remove_abandoned

SIGNALLED_AT_START = """
import os, ray, signal
from weighted_mtp.schemas.interruption import Interruption
from weighted_mtp.scoring.job.ray_cluster import ray_session

start = ray.init
def init(**settings):
    start(**settings)
    os.kill(os.getpid(), signal.SIGTERM)
ray.init = init

try:
    with Interruption(), ray_session(None):
        print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def run(scoring, many_tokens):
    return scoring(
        many_tokens(40), seconds=0.5, constants={"HEAD_SECONDS": 2.0, "PLACEMENT_SECONDS": 2.0, "STALLED_SECONDS": 10.0}
    )


def finish(run) -> None:
    """Run it to its end, and look at what it wrote."""
    run.start()
    assert run.wait() == 0, run.lines()
    scored = ShardSet.open(run.output)
    assert [check for check in verify(scored.path, scored.manifest) if check.fault] == []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def wait_for_end_of(processes: list[psutil.Process], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return tmp_path


def test_surroundings_are_private_and_removed(parent: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before = dict(os.environ)
    tokens = set()
    for _ in range(2):
        with private_surroundings():
            (directory,) = parent.iterdir()
            assert directory.stat().st_mode & 0o777 == 0o700
            assert os.environ["TMPDIR"] == os.environ["RAY_TMPDIR"] == str(directory)
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert AuthenticationTokenLoader.instance().get_raw_token() == os.environ["RAY_AUTH_TOKEN"]
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
        assert list(parent.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), private_surroundings():
        raise KeyboardInterrupt
    assert list(parent.iterdir()) == []
    assert len(tokens) == 2
    assert dict(os.environ) == before
    assert get_authentication_mode() == AuthenticationMode.DISABLED


def test_directories_of_failed_jobs_are_kept_for_a_day(parent: Path):
    with pytest.raises(UserError), private_surroundings():
        raise UserError("failed")
    (failed,) = parent.iterdir()
    (parent / "other").mkdir()
    with private_surroundings():
        assert failed.exists()
    for path in parent.iterdir():
        os.utime(path, times=(0, 0))
    with private_surroundings():
        assert not failed.exists()
        assert len(list(parent.iterdir())) == 2
        (running,) = parent.glob(f"{PREFIX}*")
        os.utime(running, times=(0, 0))
        remove_abandoned(parent)
        assert running.exists(), "it is locked"


@pytest.mark.slow
def test_signal_while_ray_has_its_own_handlers():
    run = subprocess.run([sys.executable, "-c", SIGNALLED_AT_START], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "interrupted\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "message"),
    [("gcs_server", "the head of the Ray cluster no longer answers"), ("raylet", "can hold a worker any more")],
)
def test_ray_is_killed(run, victim, message):
    run.start()
    run.wait_until(lambda: run.done() > 0)
    processes = run.children()
    run.child(victim).kill()
    assert run.wait(90) == 1
    assert run.lines()[-1].startswith("wmtp score: error: ")
    assert message in run.lines()[-1]
    wait_for_end_of(processes, 90)  # Ray's agents look for a dead gcs_server for a minute
    finish(run)


@pytest.mark.slow
def test_worker_hangs(run):
    run.start()
    run.wait_until(lambda: run.done() > 0)
    (worker,) = run.workers()
    os.kill(worker, signal.SIGSTOP)
    assert run.wait() == 0, run.lines()
    assert not psutil.pid_exists(worker)
    assert any("lost a worker (it computed nothing for 10 seconds)" in line for line in run.lines())
    assert len(run.scored()) <= 4 * (40 + 2), "it had two shards"


@pytest.mark.slow
def test_driver_is_killed(run):
    run.start()
    run.wait_until(lambda: run.done() > 0)
    processes = run.children()
    workers = [psutil.Process(worker) for worker in run.workers()]
    run.kill()
    wait_for_end_of(workers)
    wait_for_end_of(processes, 90)  # Ray's agents look for a dead gcs_server for a minute
    finish(run)


PHASES = {
    "ray": lambda run: run.child("gcs_server"),
    "models": lambda run: run.child("ray::ScoringWor"),
    "scoring": lambda run: run.done() > 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
def test_interrupted(run, phase, number):
    run.start()
    run.wait_until(lambda: PHASES[phase](run))
    processes = run.children()
    run.send(number)
    assert run.wait(60) == 128 + number
    assert "Traceback" not in run.printed.read_text()
    assert run.lines()[-1] == "wmtp score: interrupted; rerun the same command to finish it"
    wait_for_end_of(processes)
