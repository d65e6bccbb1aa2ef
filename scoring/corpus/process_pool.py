"""A process pool that preserves order and bounds the number of batches in flight."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from weighted_mtp.schemas.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, preload: str
) -> Iterator[Result]:
    """Apply `function` to every item in `workers` processes and yield the results in the order of the items.

    With one worker, everything runs in this process. At most `2 * workers + 1` items are in flight.

    Args:
        function: picklable; sent to each process once.
        items: read lazily.
        workers: number of processes.
        preload: module to import once, in the server that forks the processes.

    Raises:
        UserError: a process died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    # A terminal sends Ctrl-C to every process. The server starts with it ignored, and its forks inherit that.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, previous)
    pool = ProcessPoolExecutor(workers, context, initializer=_initialize, initargs=(function,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_apply, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizer process died; rerun with fewer --workers if memory ran out, and in a script call it under "
            "if __name__ == '__main__'"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _initialize(function: Callable[[Any], Any]) -> None:
    """Make a process ignore Ctrl-C, exit with its parent, and use one core."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)
