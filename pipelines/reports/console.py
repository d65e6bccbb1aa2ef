"""The console for output of the commands."""

import shlex
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from weighted_mtp.schemas.text import printable

WIDTH = 140
"""Width in columns when the output is not a terminal: pipes, logs and HTML pages."""


class PlainConsole(Console):
    """A console on which foreign text cannot control the terminal. Only rich itself emits control codes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with the control characters of texts escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, kept="\n"), segment.style)


def new_console(*, soft_wrap: bool = True, **settings: Any) -> Console:
    """A console that prints text literally, without markup or highlighting.

    Args:
        soft_wrap: let the terminal wrap long lines, to keep paths and commands copyable.
        settings: other arguments of `rich.console.Console`.
    """
    console = PlainConsole(markup=False, highlight=False, soft_wrap=soft_wrap, **settings)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def shell_command(template: str, *arguments: object) -> str:
    """A command for the user to copy: `template` with its `{}` replaced by the arguments, quoted for a shell."""
    return template.format(*(shlex.quote(str(argument)) for argument in arguments))
