"""`UserError`, for problems that users can fix, and one-line messages of other exceptions."""

from pydantic import ValidationError


class UserError(Exception):
    """A problem that the user can fix.

    The message is one line that names the file or flag and the remedy. The command line prints it unchanged and exits
    with status 1.
    """


def first_line(error: BaseException) -> str:
    """The message of an exception in one line. For a pydantic error: the first problem and its field."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        found = ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
        return " ".join(found.splitlines())  # a foreign key may have line breaks
    return (str(error).splitlines() or [type(error).__name__])[0]
