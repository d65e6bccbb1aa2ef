"""`UserError`, for problems that users can fix, and one-line messages of other exceptions."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

MOST_REASON = 200
"""Most characters of a library's message in a message of this project."""


class UserError(Exception):
    """A problem that the user can fix.

    The message is one line that names the file or flag and the remedy. The command line prints it unchanged and exits
    with status 1.
    """


class SettingsError(UserError, ValueError):
    """Wrong settings in a call from Python."""


class TokenizerError(UserError):
    """A tokenizer fails on a text, for the given reason."""

    def __init__(self, tokenizer: str, reason: str) -> None:
        super().__init__(f"{tokenizer} fails on a text ({reason}); use another tokenizer")
        self.reason = reason


@contextmanager
def tokenizer_errors(tokenizer: str = "the tokenizer") -> Iterator[None]:
    """Raise errors of the Rust library of tokenizers as `TokenizerError`, with this name of the tokenizer.

    Its errors are bare `Exception`s. Its panics are no `Exception`s, and cannot be pickled; the regular expression of a
    pre-tokeniser panics on a text with which it takes too many steps, such as millions of spaces.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(tokenizer, first_line(error)[:MOST_REASON]) from error


NO_CONFIG = "has no config.json; give a directory written by save_pretrained"
"""Why a directory is no model, and the remedy."""

SHORTER_PATH = "too long a path for sockets; set TMPDIR to a shorter directory for temporary files"
"""Why a directory for temporary files cannot be used, and the remedy."""


def is_socket_path_error(error: BaseException) -> bool:
    """Whether an exception of Python, Ray or ZeroMQ says that the path of a socket is longer than 107 bytes."""
    return "AF_UNIX path" in str(error) or "ipc path" in str(error)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the machine or on a GPU. Arrow and torch have exceptions of their own for that."""
    signs = ("can't allocate memory", "Failed to launch worker thread")
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or any(sign in str(error) for sign in signs)


def first_line(error: BaseException) -> str:
    """The message of an exception in one line. For a pydantic error: the first problem and its field."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        found = ": ".join(filter(None, [".".join(map(str, problem["loc"])), message]))
        return " ".join(found.splitlines())  # a foreign key may have line breaks
    return (str(error).splitlines() or [type(error).__name__])[0]
