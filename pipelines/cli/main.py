"""The entry point of `wmtp`. Parses the arguments and calls `run(config)` in the module of the command.

User mistakes print one line on stderr. The exit status is 2 for wrong usage and 1 for other errors that are not bugs.
"""

import importlib
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from weighted_mtp.pipelines.cli.errors import (
    debugging,
    describe_error,
    is_user_facing,
    show_messages,
    silence_libraries,
)
from weighted_mtp.pipelines.cli.parser import COMMANDS, parse_arguments
from weighted_mtp.pipelines.cli.streams import STDOUT, check_output, discard_output
from weighted_mtp.pipelines.cli.usage import causes, describe_usage_error
from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.interruption import Interruption

MODULES = {"import": "import_scores"}
"""Modules of commands whose names are keywords of Python. Others are named like the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `weighted_mtp.__main__` is the process around it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    name = f"wmtp {command}" if command else "wmtp"
    config: Config | None = None
    interruption = Interruption()
    try:
        with flushed_output():
            command, config = parse_arguments(arguments)
            run(command, config, interruption)
        return 0
    except ArgumentError as error:
        if debugging():
            raise
        status, message = 2, describe_usage_error(error, arguments, command, COMMANDS)
    except (Exception, KeyboardInterrupt) as error:
        if interruption.number or isinstance(error, KeyboardInterrupt):  # libraries may turn one into the other
            resumable = command is not None and "output" in COMMANDS[command].model_fields
            print(f"{name}: interrupted" + "; rerun the same command to finish it" * resumable, file=sys.stderr)
            return 128 + (interruption.number or signal.SIGINT)
        if isinstance(error, OSError) and error.filename == STDOUT:
            discard_output()
            if isinstance(error, BrokenPipeError):  # the reader has exited
                return 1
        elif debugging() or not is_user_facing(error):
            raise
        status, message = 1, describe_error(error, config)
    print(f"{name}: error: {message}", file=sys.stderr)
    return status


def run(command: str, config: Config, interruption: Interruption) -> None:
    """Import the module of a command and run it. Before that nothing has started, and a signal ends the process."""
    check_output(only_prints="output" not in type(config).model_fields and getattr(config, "html", None) is None)
    # Threads that spin while waiting slow each other down up to tenfold if they share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debugging():
        silence_libraries()
    show_messages()
    from weighted_mtp.pipelines.cli.early_checks import check_early  # needs pyarrow, which --help does not

    check_early(config)
    try:
        module = importlib.import_module(f"weighted_mtp.pipelines.{MODULES.get(command, command)}")
    except ImportError as error:
        *_, reason = causes(error)  # transformers names only the class that it could not load
        raise UserError(
            f"a library cannot be loaded ({first_line(reason)}); install the package again, or raise the limit of "
            "'ulimit -v' if one is set"
        ) from error
    with interruption:
        module.run(config)


@contextmanager
def flushed_output() -> Iterator[None]:
    """Flush stdout at the end of the block, also at an exit after --help."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
