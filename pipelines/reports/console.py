"""The console for output of the commands."""

from typing import Any

from rich.console import Console

WIDTH = 140
"""Width in columns when the output is not a terminal: pipes, logs and HTML pages."""


def new_console(*, soft_wrap: bool = True, **settings: Any) -> Console:
    """A console that prints text literally, without markup or highlighting.

    Args:
        soft_wrap: let the terminal wrap long lines, to keep paths and commands copyable.
        settings: other arguments of `rich.console.Console`.
    """
    console = Console(markup=False, highlight=False, soft_wrap=soft_wrap, **settings)
    if not console.is_terminal:
        console.width = WIDTH
    return console
