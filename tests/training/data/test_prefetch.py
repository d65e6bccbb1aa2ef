"""Values come in order, whatever the threads do; whoever leaves is not held."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count, islice
from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.data.prefetch import AbandonedError, prefetch


def test_values_come_in_the_order_of_their_keys() -> None:
    def load(key: int, left: threading.Event) -> int:
        time.sleep(0.02 if key % 4 == 0 else 0)
        return key * key

    for workers in (1, 2, 5):
        assert list(prefetch(load, iter(range(12)), workers)) == [(key, key * key) for key in range(12)]


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_values_than_workers_and_the_one_in_use(workers: int) -> None:
    alive, most = 0, 0
    lock = threading.Lock()

    class Value:
        def __init__(self) -> None:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    values = prefetch(lambda key, left: Value(), count(), workers)
    for _ in range(50):
        _, value = next(values)
        time.sleep(0.001)
        del value
    assert most == workers + 1
    values.close()


def test_an_error_comes_at_its_turn() -> None:
    def load(key: int, left: threading.Event) -> int:
        if key == 2:
            raise UserError("shard 2 is damaged")
        return key

    values = prefetch(load, count(), 4)
    assert [key for key, _ in islice(values, 2)] == [0, 1]
    with pytest.raises(UserError, match="shard 2 is damaged"):
        next(values)


def test_threads_end_when_the_iterator_is_closed() -> None:
    started = threading.Event()

    def load(key: int, left: threading.Event) -> int:
        if key == 0:
            return key
        started.set()
        assert left.wait(60)
        raise AbandonedError

    before = set(threading.enumerate())
    values = prefetch(load, count(), 3)
    next(values)
    assert started.wait(60)
    threads = set(threading.enumerate()) - before
    assert threads
    values.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_threads_end_before_a_process_that_forgot_to_close(tmp_path: Path) -> None:
    script = (
        "import itertools, pathlib, sys\n"
        "from weighted_mtp.training.data.prefetch import prefetch\n"
        "def load(key, left):\n"
        "    if key: left.wait(60); pathlib.Path(sys.argv[1]).touch()\n"
        "values = prefetch(load, itertools.count(), 1)\n"
        "next(values)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "left")], check=True, timeout=50)
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("waits", ["for the value", "elsewhere"])
def test_an_interrupted_process_does_not_wait_for_a_slow_store(waits: str, tmp_path: Path) -> None:
    """Ctrl-C while a thread hangs in a read that takes a minute and looks at nothing."""
    script = (
        "import itertools, pathlib, sys, time\n"
        "from weighted_mtp.training.data.prefetch import prefetch\n"
        "def load(key, left):\n"
        "    if key: pathlib.Path(sys.argv[1]).touch(); time.sleep(60)\n"
        "values = prefetch(load, itertools.count(), 2)\n"
        "next(values)\n"
        "next(values) if sys.argv[2] == 'for the value' else time.sleep(60)\n"
    )
    flag = tmp_path / "reading"
    process = subprocess.Popen([sys.executable, "-c", script, str(flag), waits], stderr=subprocess.PIPE)
    while not flag.exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert time.monotonic() - started < 10
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
