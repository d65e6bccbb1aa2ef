"""The lock of an output in an object store."""

import subprocess
import sys
import time

import pytest
from upath import UPath

from schemas import locks
from schemas.errors import UserError
from schemas.files import LOCK, MANIFEST, TOKENIZER, write_text
from schemas.locations import list_files
from schemas.locks import exclusive

HOLD = (
    "import sys\n"
    "from schemas import locks\n"
    "from schemas.errors import UserError\n"
    "from schemas.locations import locate\n"
    "locks.RENEWAL_SECONDS = float(sys.argv[2])\n"
    "try:\n"
    "    with locks.exclusive(locate(sys.argv[1])):\n"
    "        print('held', flush=True)\n"
    "        sys.stdin.read()\n"
    "except UserError as error:\n"
    "    print(error)\n"
)


RENEWAL_SECONDS = 1.0
"""Short enough to wait for, long enough for a process that has little of the processor to renew in time."""


@pytest.fixture(autouse=True)
def _quick_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", RENEWAL_SECONDS)


def holder(output: UPath) -> subprocess.Popen[str]:
    """Another process that takes the lock and keeps it until its input ends."""
    command = [sys.executable, "-c", HOLD, str(output), str(RENEWAL_SECONDS)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_lock_is_gone_at_the_end_however_it_ends(s3: UPath) -> None:
    with exclusive(s3):
        assert list(list_files(s3)) == [LOCK]
    assert list_files(s3) == {}
    with pytest.raises(RuntimeError), exclusive(s3):
        raise RuntimeError
    assert list_files(s3) == {}


def test_while_one_process_works_another_is_told_who_it_is(s3: UPath) -> None:
    with holder(s3) as other:
        assert first_line(other) == "held\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on .* is writing it"), exclusive(s3):
            pass
        other.communicate(timeout=60)
    assert list_files(s3) == {}


def assert_one_of_three_wins(s3: UPath) -> None:
    processes = [holder(s3) for _ in range(3)]
    said = [first_line(process) for process in processes]
    assert said.count("held\n") == 1
    assert sum("is writing it" in line for line in said) == 2
    for process in processes:
        process.communicate(timeout=60)


def test_of_several_that_start_at_once_one_wins(s3: UPath) -> None:
    assert_one_of_three_wins(s3)


def test_the_lock_of_a_killed_process_is_taken_over(s3: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(s3) as other:
        assert first_line(other) == "held\n"
        other.kill()
    assert list(list_files(s3)) == [LOCK]
    started = time.monotonic()
    with exclusive(s3):
        assert time.monotonic() - started >= 3 * locks.RENEWAL_SECONDS
    assert f"locked by process {other.pid} on" in capsys.readouterr().err
    assert list_files(s3) == {}


def test_of_several_that_take_over_at_once_one_wins(s3: UPath) -> None:
    write_text(s3 / LOCK, "process 1 on nowhere 0")
    assert_one_of_three_wins(s3)


def test_a_run_that_lost_its_lock_stops_and_leaves_the_lock_alone(
    s3: UPath, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_it() -> None:
        with exclusive(s3):
            write_text(s3 / LOCK, "process 1 on nowhere 0")
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lose_it()
    assert time.monotonic() - started < 30
    assert "the lock of this run is gone" in capsys.readouterr().err
    assert (s3 / LOCK).read_text() == "process 1 on nowhere 0"


def test_a_lock_outlives_a_store_that_is_away(s3: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: UPath) -> str:
        raise RuntimeError("the store's own exception")

    with exclusive(s3):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_content", away)
            time.sleep(2 * RENEWAL_SECONDS)
        before = (s3 / LOCK).read_text()
        time.sleep(2 * RENEWAL_SECONDS)
        assert (s3 / LOCK).read_text() != before


def test_nothing_is_written_into_a_shard_set(s3: UPath) -> None:
    write_text(s3 / MANIFEST, "{}")
    write_text(s3 / TOKENIZER / "tokenizer.json", "{}")
    with pytest.raises(UserError, match="lies inside the shard set"), exclusive(s3 / "a" / "b"):
        pass
