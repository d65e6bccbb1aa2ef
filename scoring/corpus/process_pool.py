"""A process pool that preserves order and bounds the number of batches in flight."""

import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar

from weighted_mtp.schemas.errors import SHORTER_PATH, UserError, is_socket_path_error
from weighted_mtp.schemas.interruption import Interruption

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
    start_server()
    pool = ProcessPoolExecutor(workers, context, initializer=_initialize, initargs=(function,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with Interruption(deferred=True):  # a process that is being started would miss what the pool removes
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


def start_server() -> None:
    """Start the server that forks processes. A terminal sends Ctrl-C to all; it is blocked in the server and its forks.

    Raises:
        UserError: the directory for temporary files has too long a path for a socket.
    """
    resource_tracker.ensure_running()  # unblocks Ctrl-C
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    except OSError as error:
        if is_socket_path_error(error):
            raise UserError(f"{tempfile.gettempdir()}: {SHORTER_PATH}") from error
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _initialize(function: Callable[[Any], Any]) -> None:
    """Make a process exit with its parent and use one core.

    It has no stderr, on which the Rust library of tokenizers describes each panic; the parent gets an exception.
    """
    global _function
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)
