"""The one exception that means "the user can fix this", and what others say."""

from pydantic import ValidationError


class UserError(Exception):
    """A mistake or circumstance the user can put right.

    The message is one line that names the file or flag and the remedy; the command line prints it as it is and
    exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """What an exception says in one line; of pydantic's findings, the first and what it is about."""
    if isinstance(error, ValidationError):
        finding = error.errors()[0]
        return ": ".join(filter(None, [".".join(map(str, finding["loc"])), finding["msg"]]))
    return (str(error).splitlines() or [type(error).__name__])[0]
