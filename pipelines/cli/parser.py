"""The argument parser of `wmtp`. Flags, YAML keys and help texts come from the pydantic models in `schemas.configs`."""

import argparse
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_loader
from jsonargparse.typing import register_type
from pydantic import ValidationError
from upath import UPath
from yaml import YAMLError

from weighted_mtp.pipelines.cli.settings_file import bounded
from weighted_mtp.pipelines.cli.usage import POSITIONALS, describe_validation_error
from weighted_mtp.schemas.configs import (
    Config,
    DemoConfig,
    EvaluateConfig,
    ImportConfig,
    InspectConfig,
    IterateConfig,
    ListConfig,
    PrepareConfig,
    ScoreConfig,
    ShardSets,
    TrainConfig,
    UpgradeConfig,
    VerifyConfig,
    WeightsReportConfig,
)
from weighted_mtp.schemas.storage.locations import locate

COMMANDS: dict[str, type[Config]] = {
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "import": ImportConfig,
    "inspect": InspectConfig,
    "verify": VerifyConfig,
    "upgrade": UpgradeConfig,
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

Every command also reads its settings from --config run.yaml; flags override the file.
"""
LIBRARY_HELP = {
    "version": "show the version and exit",
    "print_config": "print the settings as YAML and exit; '=skip_default' omits default values",
}
"""Replacements for help texts of jsonargparse."""
DEBUG_HELP = "show tracebacks and library logs (or set WMTP_DEBUG=1)"
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
"""Values that start with a dash. The pattern of argparse lacks exponents such as -1e-3."""
register_type(UPath, deserializer=locate, type_check=isinstance)
set_loader("yaml", bounded(get_loader("yaml")), exceptions=(YAMLError,))


def parse_arguments(arguments: Sequence[str]) -> tuple[str, Config]:
    """Parse the command line into the name of a command and its settings.

    Raises:
        ArgumentError: wrong usage, an unreadable configuration file, or contradictory settings.
        SystemExit: after printing --help, --version or --print_config.
    """
    try:
        namespace = build_parser().parse_args(list(expand_boolean_flags(arguments)))
    except (ValueError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, UnicodeError | RecursionError) else str(error)
        raise ArgumentError(None, f"Problems parsing config: {reason}") from error
    values = namespace[namespace.command].as_dict()
    values.pop("config")
    try:
        return namespace.command, COMMANDS[namespace.command].model_validate(values)
    except ValidationError as error:
        raise ArgumentError(None, describe_validation_error(error)) from error


def expand_boolean_flags(arguments: Sequence[str]) -> Iterator[str]:
    """Turn `--flag` of a boolean setting into `--flag=true` if no value follows."""
    boolean = {f"--{name}" for config in COMMANDS.values() for name in boolean_settings(config)}
    for argument, following in pairwise([*arguments, "--"]):
        bare = argument in boolean and following.startswith("--")
        yield f"{argument}=true" if bare else argument


def boolean_settings(config: type[Config]) -> Iterator[str]:
    """Dotted names of the boolean settings."""
    for name, field in config.model_fields.items():
        if field.annotation is bool:
            yield name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from (f"{name}.{inner}" for inner in boolean_settings(field.annotation))


@cache
def build_parser() -> ArgumentParser:
    """The parser of `wmtp`, with one subcommand for each entry of `COMMANDS`."""
    root = new_parser(
        prog="wmtp",
        usage="wmtp COMMAND [options]",
        description="Find out offline which tokens matter, then train on that.",
        epilog=EXAMPLES,
        version=version("weighted-mtp"),
    )
    subcommands = root.add_subcommands(
        required=True, dest="command", title="commands", description="run 'wmtp COMMAND --help' for its settings"
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


class Parser(ArgumentParser):
    """A parser that does not hide errors of the output, as argparse does."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stdout).write(message)


def new_parser(**settings: Any) -> ArgumentParser:
    """A parser that raises instead of exiting and accepts no abbreviated flags."""
    parser = Parser(exit_on_error=False, allow_abbrev=False, formatter_class=Formatter, **settings)
    parser._negative_number_matcher = NEGATIVE_NUMBER
    parser.add_argument("--debug", action=DebugAction, help=DEBUG_HELP)
    return parser


class DebugAction(argparse.Action):
    """`--debug` sets WMTP_DEBUG=1, which worker processes inherit."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help=help)

    def __call__(self, *_: object) -> None:
        """Switch debugging on."""
        os.environ["WMTP_DEBUG"] = "1"


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help with defaults instead of Python types; choices and descriptions are clearer."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = LIBRARY_HELP.get(action.dest, action.help or "")
        if action.required and text:
            return f"{text} (required)"
        return text if action.default in (None, SUPPRESS, ()) else f"{text} (default: %(default)s)"
