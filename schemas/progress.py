"""Progress of long operations: a bar on a terminal, an occasional plain line in a log."""

import sys
import time
from collections.abc import Sized
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Minimum time between two lines of one bar in a log."""
LINE = "{desc}: {n_fmt} {unit}, {elapsed} elapsed, {rate_fmt}{postfix}"
LINE_WITH_TOTAL = (
    "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"
)


class ProgressBar(tqdm):
    """A tqdm bar on stderr. If stderr is not a terminal, it writes at most one plain line every `LINE_SECONDS`.

    Shorter operations write nothing to a log.

    Args:
        iterable: items to count, as for `tqdm`.
        settings: arguments of `tqdm`; `leave` applies to terminals only.
    """

    def __init__(self, iterable: Any = None, **settings: Any) -> None:
        self.in_log = not sys.stderr.isatty()
        self.line_at = time.monotonic() + LINE_SECONDS
        if self.in_log:
            if isinstance(iterable, Sized):
                settings.setdefault("total", len(iterable))
            line = LINE_WITH_TOTAL if settings.get("total") else LINE
            settings |= {"bar_format": line, "leave": False}
        super().__init__(iterable, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the current state; in a log only if `LINE_SECONDS` have passed since the last line."""
        if not self.in_log:
            super().display(msg, pos)
        elif msg is None and time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + LINE_SECONDS
            print(" ".join(str(self).split()), file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from a terminal. Lines in a log stay."""
        if not self.in_log:
            super().clear(nolock)

    def moveto(self, n: int) -> None:
        """Move the cursor of a terminal by `n` lines."""
        if not self.in_log:
            super().moveto(n)
