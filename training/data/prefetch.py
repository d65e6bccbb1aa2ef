"""Values prepared ahead in threads, handed out in order."""

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from itertools import islice
from threading import Event, Thread
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

PATIENCE = 0.5
"""Seconds for which a consumer who leaves waits for threads to notice it. Later ones die with the process."""


class AbandonedError(Exception):
    """Ends a thread whose value nobody waits for any more."""


def prefetch(load: Callable[[Key, Event], Value], keys: Iterator[Key], workers: int) -> Generator[tuple[Key, Value]]:
    """Yield `key, load(key, left)` for every key, in order, while threads prepare the next `workers` values.

    An exception in `load` is raised when the turn of its key comes. `left` is set when the iterator is closed: `load`
    should look at it between steps and raise `AbandonedError`. With the value that was yielded last there are at most
    `workers + 1` at any time, if the consumer drops that one before it asks for the next.
    """
    left = Event()

    def start(key: Key) -> tuple[Key, Future[Value]]:
        future: Future[Value] = Future()

        def work() -> None:
            try:
                future.set_result(load(key, left))
            except BaseException as error:
                future.set_exception(error)

        # A pool would join its threads before the process may end, however long a store takes to answer.
        Thread(target=work, daemon=True).start()
        return key, future

    def leave() -> None:
        left.set()
        wait([future for _, future in ahead], timeout=PATIENCE)

    ahead = deque(map(start, islice(keys, workers)))
    atexit.register(leave)  # a thread that dies with the process inside of Arrow would abort it
    try:
        while ahead:
            key, future = ahead[0]
            value = future.result()
            ahead.popleft()
            ahead.extend(map(start, islice(keys, 1)))
            yield key, value
    finally:
        atexit.unregister(leave)
        leave()
