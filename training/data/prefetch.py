"""Prefetching: threads compute values ahead; the values are yielded in order."""

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from itertools import islice
from threading import Event, Thread
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

CLOSE_TIMEOUT = 0.5
"""Seconds to wait for threads to stop on closing. Threads still running then end with the process."""


class AbandonedError(Exception):
    """Ends a thread after its iterator is closed."""


def prefetch(load: Callable[[Key, Event], Value], keys: Iterator[Key], workers: int) -> Generator[tuple[Key, Value]]:
    """Yield `key, load(key, closed)` for every key, in order, while threads compute the next `workers` values.

    An exception in `load` is raised when its key is due. `closed` is set when the iterator is closed; `load` should
    check it between steps and raise `AbandonedError`. At most `workers + 1` values are in memory, including the last
    yielded one, if the consumer drops that one before requesting the next.
    """
    closed = Event()

    def start(key: Key) -> tuple[Key, Future[Value]]:
        future: Future[Value] = Future()

        def work() -> None:
            try:
                future.set_result(load(key, closed))
            except BaseException as error:
                future.set_exception(error)

        # A thread pool would keep the process alive until its threads finish, even if a store never responds.
        Thread(target=work, daemon=True).start()
        return key, future

    def close() -> None:
        closed.set()
        wait([future for _, future in ahead], timeout=CLOSE_TIMEOUT)

    ahead = deque(map(start, islice(keys, workers)))
    atexit.register(close)  # the process aborts if it ends while a thread is inside Arrow
    try:
        while ahead:
            key, future = ahead[0]
            value = future.result()
            ahead.popleft()
            ahead.extend(map(start, islice(keys, 1)))
            yield key, value
    finally:
        atexit.unregister(close)
        close()
