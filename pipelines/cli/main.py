"""The command `wmtp`: one subcommand for each module of this package that has a `run(config)`.

Flags, YAML keys and help texts all come from the pydantic models in `schemas.configs`. Every mistake a user can make
ends in one line on stderr: exit status 2 for wrong usage, 1 for everything else that is not a bug.
"""

import argparse
import importlib
import io
import os
import re
import signal
import sys
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import register_type
from pydantic import ValidationError
from upath import UPath

from weighted_mtp.pipelines.cli.errors import debugging, describe, is_for_users, quieten_libraries
from weighted_mtp.pipelines.cli.usage import POSITIONALS, reason_of, usage_sentence
from weighted_mtp.schemas.configs import (
    Config,
    DemoConfig,
    EvaluateConfig,
    InspectConfig,
    IterateConfig,
    ListConfig,
    PrepareConfig,
    ScoreConfig,
    ShardSets,
    TrainConfig,
    VerifyConfig,
    WeightsReportConfig,
)
from weighted_mtp.schemas.storage.locations import locate

COMMANDS: dict[str, type[Config]] = {
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "inspect": InspectConfig,
    "verify": VerifyConfig,
    "weights": WeightsReportConfig,
    "list": ListConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "iterate": IterateConfig,
    "demo": DemoConfig,
}
EXAMPLES = """examples:
  wmtp score --input corpus --output scored --reference small-model --short_context 512
  wmtp train --input scored --model big-model --output run --weights.preset dense

Every command takes its settings from --config run.yaml too; flags override the file.
"""
DEBUG_HELP = "show tracebacks and what libraries log (or set WMTP_DEBUG=1)"
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
"""What is a value and no flag; argparse's own does not know -1e-3."""
register_type(UPath, deserializer=locate, type_check=isinstance)


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
        command, config = parse(arguments)
        # Threads that spin while they wait stall each other wherever cores are shared: up to ten times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if not debugging():
            quieten_libraries()
        importlib.import_module(f"weighted_mtp.pipelines.{command}").run(config)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        resumable = command is not None and "output" in COMMANDS[command].model_fields
        print(f"{name}: interrupted" + "; rerun the same command to finish it" * resumable, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; Python must not try to flush the rest of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UnicodeDecodeError, RecursionError) as error:
        if debugging():
            raise
        status, sentence = 2, f"--config: not a YAML file of settings ({type(error).__name__}); correct the file"
    except ArgumentError as error:
        if debugging():
            raise
        status, sentence = 2, usage_sentence(error, command, COMMANDS)
    except Exception as error:
        if debugging() or not is_for_users(error):
            raise
        status, sentence = 1, describe(error, config)
    print(f"{name}: error: {sentence}", file=sys.stderr)
    return status


def parse(arguments: Sequence[str]) -> tuple[str, Config]:
    """Turn the command line into the name of a command and its settings.

    Raises:
        ArgumentError: not a command line that `wmtp` understands, or settings that contradict each other.
        SystemExit: after the output of --help, --version or --print_config.
    """
    namespace = build_parser().parse_args(list(spell_out_switches(arguments)))
    values = namespace[namespace.command].as_dict()
    values.pop("config")
    try:
        return namespace.command, COMMANDS[namespace.command].model_validate(values)
    except ValidationError as error:
        raise ArgumentError(None, reason_of(error)) from error


def spell_out_switches(arguments: Sequence[str]) -> Iterator[str]:
    """Give `--flag` the value true where it is a yes or no and no value follows."""
    switches = {f"--{name}" for config in COMMANDS.values() for name in switch_names(config)}
    for argument, following in pairwise([*arguments, "--"]):
        alone = argument in switches and following.startswith("--")
        yield f"{argument}=true" if alone else argument


def switch_names(config: type[Config]) -> Iterator[str]:
    """Names of the settings that are a yes or no, with dots."""
    for name, field in config.model_fields.items():
        if field.annotation is bool:
            yield name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from (f"{name}.{inner}" for inner in switch_names(field.annotation))


def build_parser() -> ArgumentParser:
    """The parser of `wmtp` with one subcommand for each entry of `COMMANDS`."""
    root = new_parser(
        prog="wmtp",
        usage="wmtp COMMAND [options]",
        description="Find out offline which tokens matter, then train on that.",
        epilog=EXAMPLES,
        version=version("weighted-mtp"),
    )
    subcommands = root.add_subcommands(
        required=True, dest="command", title="commands", description="'wmtp COMMAND --help' explains one of them."
    )
    for name, config in COMMANDS.items():
        subcommands.add_subcommand(name, command_parser(name, config), help=config.__doc__)
    return root


def command_parser(name: str, config: type[Config]) -> ArgumentParser:
    """The parser of one command."""
    types = get_type_hints(config, include_extras=True)
    positionals = {key: field for key, field in config.model_fields.items() if key in POSITIONALS}
    usage = " ".join([f"wmtp {name}", *(key.upper() for key in positionals), "[options]"])
    parser = new_parser(usage=usage, description=config.__doc__)
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with settings")
    for key, field in positionals.items():
        kind = types[key] if types[key] == ShardSets else UPath
        parser.add_argument(key, type=kind, nargs=POSITIONALS[key], metavar=key.upper(), help=field.description)
    groups = {parser.add_argument_group(heading): names for heading, names in config.HELP_GROUPS.items()}
    parser.add_class_arguments(config, None, as_group=False, skip=set(positionals))
    for group, names in groups.items():
        for action in [action for action in parser._optionals._group_actions if action.dest in names]:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
    return parser


def new_parser(**settings: Any) -> ArgumentParser:
    """A parser that raises instead of exiting and does not guess at abbreviated flags."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, formatter_class=Formatter, **settings)
    parser._negative_number_matcher = NEGATIVE_NUMBER
    parser.add_argument("--debug", action=DebugAction, help=DEBUG_HELP)
    return parser


class DebugAction(argparse.Action):
    """`--debug` sets WMTP_DEBUG=1, so that worker processes know it too."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help=help)

    def __call__(self, *_: object) -> None:
        """Switch debugging on."""
        os.environ["WMTP_DEBUG"] = "1"


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with defaults but without Python types: choices and descriptions say more."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and text:
            return f"{text} (required)"
        return text if action.default in (None, SUPPRESS, ()) else f"{text} (default: %(default)s)"
