"""The entry point of `wmtp`. Parses the arguments and calls `run(config)` in the module of the command.

User mistakes print one line on stderr. The exit status is 2 for wrong usage and 1 for other errors that are not bugs.
"""

import importlib
import io
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from weighted_mtp.pipelines.cli.errors import (
    debugging,
    describe_error,
    is_user_facing,
    show_messages,
    silence_libraries,
)
from weighted_mtp.pipelines.cli.parser import COMMANDS, parse_arguments
from weighted_mtp.pipelines.cli.usage import describe_usage_error
from weighted_mtp.schemas.configs import Config

MODULES = {"import": "import_scores"}
"""Modules of commands whose names are keywords of Python. Others are named like the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    name = f"wmtp {command}" if command else "wmtp"
    config: Config | None = None
    if sys.stdout is None:  # closed by the shell
        sys.stdout = io.StringIO()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command, config = parse_arguments(arguments)
        run(command, config)
        return 0
    except KeyboardInterrupt:
        resumable = command is not None and "output" in COMMANDS[command].model_fields
        print(f"{name}: interrupted" + "; rerun the same command to finish it" * resumable, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has exited. Prevent Python from flushing the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ArgumentError as error:
        if debugging():
            raise
        status, message = 2, describe_usage_error(error, arguments, command, COMMANDS)
    except Exception as error:
        if debugging() or not is_user_facing(error):
            raise
        status, message = 1, describe_error(error, config)
    print(f"{name}: error: {message}", file=sys.stderr)
    return status


def run(command: str, config: Config) -> None:
    """Import the module of a command and run it."""
    # Threads that spin while waiting slow each other down up to tenfold if they share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debugging():
        silence_libraries()
    show_messages()
    importlib.import_module(f"weighted_mtp.pipelines.{MODULES.get(command, command)}").run(config)
    sys.stdout.flush()
