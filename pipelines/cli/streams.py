"""The standard streams of the process: open, and with errors that name them. Imports nothing slow."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = "standard output"
"""File name in errors of stdout."""


class StandardOutput(io.TextIOWrapper):
    """Stdout as a text stream. Escapes characters that its encoding lacks."""

    def write(self, text: str) -> int:
        """Write text; an OSError names the stream."""
        with named_errors():
            return super().write(text)

    def flush(self) -> None:
        """Flush; an OSError names the stream."""
        with named_errors():
            super().flush()


@contextmanager
def named_errors() -> Iterator[None]:
    """Name stdout in an OSError."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def open_standard_streams() -> None:
    """Open what the shell closed: other files would get these numbers, and anything printed would go there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    sys.stdout = StandardOutput(
        os.fdopen(1, "wb", closefd=False),
        encoding=sys.stdout.encoding if sys.stdout else None,
        errors="backslashreplace",
        line_buffering=os.isatty(1) or getattr(sys.stdout, "write_through", False),  # True with PYTHONUNBUFFERED
    )


def discard_output() -> None:
    """Drop what stdout holds and will get, after an error of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
