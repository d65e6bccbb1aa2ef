"""The lock of an output on a disk and in an object store."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import s3fs
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage import locks
from weighted_mtp.schemas.storage.files import LOCK, MANIFEST, TOKENIZER, write_text
from weighted_mtp.schemas.storage.locations import list_files
from weighted_mtp.schemas.storage.locks import check_held, exclusive

HOLD = """
from weighted_mtp.schemas.storage import locks
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.locations import locate
locks.RENEWAL_SECONDS = seconds
try:
    with locks.exclusive(locate(output)):
        said.send("held")
        said.recv()
except UserError as error:
    said.send(str(error))
"""


RENEWAL_SECONDS = 1.0
"""Short enough to wait for, long enough for a process that has little of the processor to renew in time."""


@pytest.fixture(autouse=True)
def _quick_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", RENEWAL_SECONDS)


@dataclass
class Holder:
    """Another process that takes the lock and keeps it until it is let go."""

    process: BaseProcess
    connection: Connection

    def said(self) -> str:
        """Whether it holds the lock, or why not."""
        assert self.connection.poll(60)
        return self.connection.recv()

    def let_go(self) -> None:
        with suppress(BrokenPipeError):  # it has ended already
            self.connection.send("let go")
        self.process.join(60)
        assert self.process.exitcode == 0


@pytest.fixture
def holder(s3: UPath, start_process: Callable[..., BaseProcess]) -> Callable[[], Holder]:
    def start() -> Holder:
        ours, theirs = Pipe()
        process = start_process(HOLD, output=str(s3), seconds=RENEWAL_SECONDS, said=theirs)
        return Holder(process, ours)

    return start


def test_a_lock_is_gone_at_the_end_however_it_ends(s3: UPath) -> None:
    with exclusive(s3):
        assert list(list_files(s3)) == [LOCK]
    assert list_files(s3) == {}
    with pytest.raises(RuntimeError), exclusive(s3):
        raise RuntimeError
    assert list_files(s3) == {}


def test_a_second_process_names_the_lock_holder(s3: UPath, holder: Callable[[], Holder]) -> None:
    other = holder()
    assert other.said() == "held"
    with pytest.raises(UserError, match=rf"process {other.process.pid} on .* is writing to it"), exclusive(s3):
        pass
    other.let_go()
    assert list_files(s3) == {}


def assert_one_of_three_wins(holder: Callable[[], Holder]) -> None:
    holders = [holder() for _ in range(3)]
    said = [each.said() for each in holders]
    assert said.count("held") == 1
    assert sum("is writing to it" in line for line in said) == 2
    for each in holders:
        each.let_go()


def test_one_of_several_concurrent_starts_wins(holder: Callable[[], Holder]) -> None:
    assert_one_of_three_wins(holder)


def test_the_lock_of_a_killed_process_is_taken_over(
    s3: UPath, holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = holder()
    assert other.said() == "held"
    other.process.kill()
    other.process.join()
    assert list(list_files(s3)) == [LOCK]
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)
    started = time.monotonic()
    with exclusive(s3):
        assert time.monotonic() - started >= 3 * locks.RENEWAL_SECONDS
    assert f"locked by process {other.process.pid} on" in caplog.text
    assert list_files(s3) == {}


@pytest.mark.slow
def test_one_of_several_concurrent_takeovers_wins(s3: UPath, holder: Callable[[], Holder]) -> None:
    write_text(s3 / LOCK, "process 1 on nowhere 0")
    assert_one_of_three_wins(holder)


def test_a_run_that_lost_its_lock_stops_and_leaves_the_lock_alone(
    s3: UPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.2)

    def lose_it() -> None:
        with exclusive(s3):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # again, should a renewal that had read before have written after
                write_text(s3 / LOCK, "process 1 on nowhere 0")
                time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        lose_it()
    assert "this run no longer holds its lock" in caplog.text
    assert (s3 / LOCK).read_text() == "process 1 on nowhere 0"


def test_a_lock_survives_a_store_outage(s3: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_store_is_asked_about_a_lock_that_another_process_may_have_taken(
    s3: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 60.0)
    with exclusive(s3) as held:
        own = (s3 / LOCK).read_text()
        write_text(s3 / LOCK, "process 1 on nowhere 0")
        assert held(), "no process takes a lock that was renewed a moment ago"
        monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.0)
        assert not held()
        with pytest.raises(UserError, match="another run has taken over its lock; rerun the same command when it ends"):
            check_held(s3, held)
        write_text(s3 / LOCK, own)
        check_held(s3, held)


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
    with pytest.raises(UserError, match="process 1 on nowhere is writing to it"), exclusive(s3):
        pass


def test_nothing_is_written_into_a_shard_set(s3: UPath) -> None:
    write_text(s3 / MANIFEST, "{}")
    write_text(s3 / TOKENIZER / "tokenizer.json", "{}")
    with pytest.raises(UserError, match="lies inside the shard set"), exclusive(s3 / "a" / "b"):
        pass


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    """A second process is refused while the first runs, and the lock goes with the process."""
    output = tmp_path / "out"
    script = (
        "import sys\nfrom pathlib import Path\nfrom weighted_mtp.schemas.storage.locks import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing to it"), exclusive(output):
            pass
        holder.kill()
    with exclusive(output):
        pass


def test_an_empty_directory_is_left_as_it_was_found(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "not-there"):
        with pytest.raises(RuntimeError), exclusive(tmp_path / name):
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_nothing_is_written_into_a_shard_set_on_a_disk(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).touch()
    (tmp_path / TOKENIZER).mkdir()
    with pytest.raises(UserError, match="lies inside the shard set"), exclusive(tmp_path / "a" / "b"):
        pass


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"its .lock is a link, .*; remove it"), exclusive(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()
