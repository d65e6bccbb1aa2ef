"""Interruption by SIGINT (Ctrl-C) or SIGTERM. Imports nothing slow, because it comes before all other imports."""

import os
import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_SECONDS = 1.0
"""Signals within this time after the first belong to it: `timeout` and launchers send several."""


def heeded_signals() -> list[signal.Signals]:
    """The signals to handle in this thread: none outside the main thread, and none that a background job ignores."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def end_process(number: int, _: FrameType | None = None) -> None:
    """Say that a signal ends this process, and exit at once with the status that shells report for it."""
    try:
        os.write(2, b"wmtp: interrupted\n")
    finally:
        os._exit(128 + number)


class Interruption(AbstractContextManager["Interruption"]):
    """Handles SIGINT and SIGTERM inside a block: the first raises KeyboardInterrupt.

    A signal more than `PATIENCE_SECONDS` later goes to the previous handler. In the process of `wmtp` that one ends it.

    Args:
        deferred: hold the first signal back until the end of the block, for code that an exception at any place would
            break, such as the start of other processes.

    Attributes:
        number: number of the first signal; 0 before.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.deferred = deferred
        self.number = 0
        self.received_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.previous = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.deferred and self.number:
            signal.raise_signal(self.number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self.received_at = number, time.monotonic()
            if not self.deferred:
                raise KeyboardInterrupt
        elif time.monotonic() > self.received_at + PATIENCE_SECONDS:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
