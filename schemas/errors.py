"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake or circumstance the user can put right.

    The message is one line that names the file or flag and the remedy; the command line prints it as it is and
    exits with status 1.
    """
