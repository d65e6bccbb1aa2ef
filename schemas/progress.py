"""Progress of long operations: a bar on a terminal, an occasional plain line in a log.

Library functions take a `MakeBar` and show nothing by default. The commands pass `ProgressBar`.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Minimum time between two lines of one bar in a log."""


class ProgressBar(tqdm):
    """A tqdm bar on stderr. If stderr is not a terminal, it writes at most one plain line every `LINE_SECONDS`.

    Shorter operations write nothing to a log.

    Args:
        iterable: items to count, as for `tqdm`.
        unit: name of the items in the plural.
        settings: other arguments of `tqdm`; `leave` applies to terminals only.
    """

    def __init__(self, iterable: Any = None, *, unit: str, **settings: Any) -> None:
        self.in_log = not sys.stderr.isatty()
        self.line_at = time.monotonic() + LINE_SECONDS
        if self.in_log:
            settings["leave"] = False
        super().__init__(iterable, unit=f" {unit}", **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the current state; in a log only if `LINE_SECONDS` have passed since the last line."""
        if not self.in_log:
            super().display(msg, pos)
        elif msg is None and time.monotonic() >= self.line_at:
            self.line_at = time.monotonic() + LINE_SECONDS
            print(self.line(), file=self.fp, flush=True)

    def line(self) -> str:
        """The state for a log, such as `train: 40%, 400 of 1,000 steps in 01:20, 5.0 per second, 02:00 left`."""
        state = self.format_dict
        done, total, seconds = state["n"], state["total"], state["elapsed"]
        rate = state["rate"] or (done - state["initial"]) / max(seconds, 1e-3)
        parts = [f"{done / total:.0%}, {done:,} of {total:,}{self.unit}" if total else f"{done:,}{self.unit}"]
        parts[0] += f" in {self.format_interval(seconds)}"
        parts.append(f"{rate:,.{0 if rate >= 100 else 1}f} per second")
        if total and rate:
            parts.append(f"{self.format_interval((total - done) / rate)} left")
        if self.postfix:
            parts.append(str(self.postfix))
        return f"{self.desc}: {', '.join(parts)}"

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from a terminal. Lines in a log stay."""
        if not self.in_log:
            super().clear(nolock)

    def moveto(self, n: int) -> None:
        """Move the cursor of a terminal by `n` lines."""
        if not self.in_log:
            super().moveto(n)


MakeBar = Callable[..., tqdm]
"""Makes a bar from `total`, `desc`, `unit` and other arguments of `tqdm`: `ProgressBar`, or any class of tqdm."""


def hidden_bar(**settings: Any) -> tqdm:
    """A bar that shows nothing: the default of functions with a `MakeBar`."""
    return tqdm(**settings | {"disable": True})
