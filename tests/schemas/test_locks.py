"""The lock of an output in an object store."""

import subprocess
import sys
import threading
import time
from itertools import count

import pytest
import s3fs
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


def test_the_lock_of_a_killed_process_is_taken_over(
    s3: UPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(s3) as other:
        assert first_line(other) == "held\n"
        other.kill()
    assert list(list_files(s3)) == [LOCK]
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)
    started = time.monotonic()
    with exclusive(s3):
        assert time.monotonic() - started >= 3 * locks.RENEWAL_SECONDS
    assert f"locked by process {other.pid} on" in capsys.readouterr().err
    assert list_files(s3) == {}


def test_of_several_that_take_over_at_once_one_wins(s3: UPath) -> None:
    write_text(s3 / LOCK, "process 1 on nowhere 0")
    assert_one_of_three_wins(s3)


def test_a_run_that_lost_its_lock_stops_and_leaves_the_lock_alone(
    s3: UPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)

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
    asked = threading.Event()

    def away(_: UPath) -> str:
        asked.set()
        raise RuntimeError("the store's own exception")

    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)
    with exclusive(s3):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_content", away)
            assert asked.wait(30)
        before = locks._content(s3 / LOCK)
        deadline = time.monotonic() + 30
        while locks._content(s3 / LOCK) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_lock_is_read_whole_while_its_holder_renews_it(s3: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that somebody has begun to read it, it changes; that is no error, and shows that the holder lives."""
    write_text(s3 / LOCK, "process 1 on nowhere 0")
    bucket, _, key = (s3 / LOCK).path.partition("/")
    times = count(1)
    call = s3fs.S3FileSystem._call_s3

    async def renew_before_reading(self: s3fs.S3FileSystem, method: str, *args: object, **kwargs: object) -> dict:
        if method == "get_object":
            content = f"process 1 on nowhere {next(times)}".encode()
            await call(self, "put_object", Bucket=bucket, Key=key, Body=content)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", renew_before_reading)
    with pytest.raises(UserError, match="process 1 on nowhere is writing it"), exclusive(s3):
        pass


def test_nothing_is_written_into_a_shard_set(s3: UPath) -> None:
    write_text(s3 / MANIFEST, "{}")
    write_text(s3 / TOKENIZER / "tokenizer.json", "{}")
    with pytest.raises(UserError, match="lies inside the shard set"), exclusive(s3 / "a" / "b"):
        pass
