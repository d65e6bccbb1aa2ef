"""Describes wrong usage in one plain sentence.

jsonargparse and pydantic report a rejected value in several lines and in terms of Python types, not flags.
"""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from itertools import pairwise

from pydantic import ValidationError
from yaml import MarkedYAMLError

from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.text import printable

POSITIONALS = {"set": None, "directories": "+"}
"""Settings passed without a flag, and their `nargs` in argparse."""


def describe_usage_error(
    error: ArgumentError, arguments: Sequence[str], command: str | None, commands: dict[str, type[Config]]
) -> str:
    """Describe the mistake in the command line or in the file of --config, and where to find help."""
    see = f"see 'wmtp {command} --help'" if command else "see 'wmtp --help'"
    message = str(error)
    config = f"--config {', '.join(values_of('--config', arguments))}"
    flags = [name for name in option_strings(commands[command]) if name[2:] not in POSITIONALS] if command else []
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = [flag(key.removeprefix(f"{command}.")) for key in missing[1].split(", ")]
        return f"{', '.join(names)} missing; {see}"
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
        name = re.split("[ =]", unknown[1])[0]
        return f"unknown argument {name}{suggestion(name, flags)}; {see}"
    if unknown := re.search(r"does not accept option '(.*)'", message):
        setting = flag(unknown[1].partition(".")[0])
        where = setting if is_given(setting, arguments) else config
        return f"{where}: unknown setting '{unknown[1]}'{suggestion(unknown[1], flags)}; {see}"
    if invalid := re.search(r"invalid choice: '(.*?)'|one of {.*}, but it was not provided", message):
        wrong = f"unknown command '{invalid[1]}'" if invalid[1] else "no command given"
        return f"{wrong}; choose from {', '.join(commands)}"
    if unreadable := re.match(r'Parser key "config":\s*(.*?)(:|$)', message):
        return f"{config}: {unreadable[1].lower()}; check the path"
    if keyed := re.match(r'Parser key "(.*?)"(?: element \d+)?:\s*(.*)', message, re.DOTALL):
        from_file = config if not is_given(flag(keyed[1]), arguments) and values_of("--config", arguments) else ""
        where = f"{from_file}: {keyed[1]}" if from_file else flag(keyed[1])
        return f"{where}: {describe_value_error(keyed[2], error)}; {see}"
    if malformed := re.match(r"Problems parsing config: (.*)", message, re.DOTALL):
        return f"{config}: not valid YAML ({describe_yaml_error(error) or one_line(malformed[1])}); correct the file"
    if message.startswith("Unexpected config: "):
        return f"{config}: holds no settings, such as 'seed: 1'; correct the file"
    return f"{one_line(message)}; {see}"


def values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """The values given to a flag, as `--flag value` or `--flag=value`."""
    after = [value for argument, value in pairwise(arguments) if argument == name]
    return after + [argument.removeprefix(f"{name}=") for argument in arguments if argument.startswith(f"{name}=")]


def is_given(name: str, arguments: Sequence[str]) -> bool:
    """Whether a flag, or a flag of one of its nested settings, is among the arguments."""
    return name in POSITIONALS or any(re.match(rf"{re.escape(name)}([.=+]|$)", argument) for argument in arguments)


def describe_yaml_error(error: BaseException) -> str | None:
    """Line and problem of a syntax error in a YAML file; None for other errors."""
    for cause in causes(error):
        if isinstance(cause, MarkedYAMLError) and cause.problem_mark is not None:
            return f"line {cause.problem_mark.line + 1}: {cause.problem}"
    return None


def describe_value_error(message: str, error: ArgumentError) -> str:
    """Describe why a value is rejected, in the words of pydantic if available."""
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    but_got = f", not '{one_line(given[1])}'" if given else ""
    for cause in causes(error):
        if isinstance(cause, UnicodeEncodeError):
            return "should be in UTF-8"
        if isinstance(cause, ValidationError):
            return describe_validation_error(cause, given[1] if given else "")
    if choices := re.search(r"Literal\[(.*?)\]", message):
        return f"should be one of {choices[1]}{but_got}"
    if "<class 'tuple'>" in message:
        return f"should be a list such as '[a,b]'{but_got}"
    if expected := re.search(r"Expected an? <class '(\w+)'>", message):
        return f"should be of type {expected[1]}{but_got}"
    return one_line(re.sub(r"Problem with given class_path '\S*':|^Not of type UPath:", "", message))


def describe_validation_error(error: ValidationError, given: str | None = None) -> str:
    """The first pydantic error, preceded by its flag unless the message starts with one.

    `given` is the value as it was written, empty if unknown; None if the error is that of the whole settings, and the
    value is in it.
    """
    finding = error.errors()[0]
    where = ".".join(part for part in finding["loc"] if isinstance(part, str))
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] != "value_error":  # not written by this project
        value = str(finding["input"]) if given is None and isinstance(finding["input"], float) else given
        message = message.replace("Input should", "should") + (f", not '{one_line(value)}'" if value else "")
    return message if message.startswith("--") or not where else f"{flag(where)}: {message}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__


def suggestion(wrong: str, flags: list[str]) -> str:
    """A hint with the flags closest to an unknown one; empty if none is close."""
    close = difflib.get_close_matches(wrong.removeprefix("--"), [name.removeprefix("--") for name in flags], n=2)
    return f" (did you mean {' or '.join(f'--{name}' for name in close)}?)" if close else ""


def option_strings(config: type[Config], prefix: str = "--") -> Iterator[str]:
    """Every flag of a command; nested settings in dotted form."""
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from option_strings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flag(key: str) -> str:
    """The command-line flag of a setting."""
    return key.upper() if key in POSITIONALS else f"--{key}"


def one_line(text: str) -> str:
    """`text` without line breaks and control characters."""
    return printable(" ".join(text.split()))
