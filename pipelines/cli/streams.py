"""The standard streams of the process: open, and with errors that name them. Imports nothing slow."""

import errno
import fcntl
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


class StandardError(io.TextIOWrapper):
    """Stderr as a text stream. Messages that cannot be written are lost, and do not end a command."""

    def write(self, text: str) -> int:
        """Write text."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush."""
        with suppress(OSError):
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
    """Open what the shell closed: other files would get these numbers, and anything printed would go there.

    Stdout cannot be written then; see `check_output`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the lowest free number.
            os.open(os.devnull, os.O_RDONLY if descriptor == 1 else os.O_RDWR)
    sys.stderr = StandardError(
        os.fdopen(2, "wb", closefd=False),
        encoding=sys.stderr.encoding if sys.stderr else None,
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.stdout = StandardOutput(
        os.fdopen(1, "wb", closefd=False),
        encoding=sys.stdout.encoding if sys.stdout else None,
        errors="backslashreplace",
        line_buffering=os.isatty(1) or getattr(sys.stdout, "write_through", False),  # True with PYTHONUNBUFFERED
    )


def check_output(only_prints: bool) -> None:
    """Check that the shell did not close stdout.

    Raises:
        OSError: it did, and the command only prints. What other commands print is dropped.
    """
    if isinstance(sys.stdout, StandardOutput) and fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        if only_prints:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), STDOUT)
        discard_output()


def discard_output() -> None:
    """Drop what stdout holds and will get, after an error of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
