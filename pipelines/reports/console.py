"""The console that commands print to."""

from typing import Any

from rich.console import Console

WIDTH = 140
"""Width in columns where the output is no terminal: in pipes, logs and HTML pages."""


def new_console(*, soft_wrap: bool = True, **settings: Any) -> Console:
    """A console that takes text literally: without markup and automatic highlighting.

    Args:
        soft_wrap: leave long lines to the terminal, so that paths and commands can be copied.
        settings: further arguments of `rich.console.Console`.
    """
    console = Console(markup=False, highlight=False, soft_wrap=soft_wrap, **settings)
    if not console.is_terminal:
        console.width = WIDTH
    return console
