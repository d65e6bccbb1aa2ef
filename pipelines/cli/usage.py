"""Describes wrong usage in one plain sentence.

jsonargparse and pydantic report a rejected value in several lines and in terms of Python types, not flags.
"""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterator

from pydantic import ValidationError

from weighted_mtp.schemas.configs import Config

POSITIONALS = {"set": None, "directories": "+"}
"""Settings passed without a flag, and their `nargs` in argparse."""


def describe_usage_error(error: ArgumentError, command: str | None, commands: dict[str, type[Config]]) -> str:
    """Describe the mistake in the command line, and where to find help."""
    see = f"see 'wmtp {command} --help'" if command else "see 'wmtp --help'"
    message = str(error)
    flags = list(option_strings(commands[command])) if command else []
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        names = [flag(key.removeprefix(f"{command}.")) for key in missing[1].split(", ")]
        return f"{', '.join(names)} missing; {see}"
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
        return f"unknown argument {unknown[1]}{suggestion(unknown[1].split()[0], flags)}; {see}"
    if unknown := re.search(r"does not accept option '(.*)'", message):
        return f"--config: unknown setting '{unknown[1]}'{suggestion(f'--{unknown[1]}', flags)}; {see}"
    if invalid := re.search(r"invalid choice: '(.*?)'|one of {.*}, but it was not provided", message):
        wrong = f"unknown command '{invalid[1]}'" if invalid[1] else "no command given"
        return f"{wrong}; choose from {', '.join(commands)}"
    if keyed := re.match(r'Parser key "(.*?)":\s*(.*)', message, re.DOTALL):
        return f"{flag(keyed[1])}: {describe_value_error(keyed[2], error)}; {see}"
    if malformed := re.match(r"Problems parsing config: (.*)", message, re.DOTALL):
        return f"--config: not valid YAML ({one_line(malformed[1])}); correct the file"
    if message.startswith("Unexpected config: "):
        return "--config: not a mapping of settings to values; correct the file"
    return f"{one_line(message)}; {see}"


def describe_value_error(message: str, error: ArgumentError) -> str:
    """Describe why a value is rejected, in the words of pydantic if available."""
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    but_got = f", not '{given[1]}'" if given else ""
    for cause in causes(error):
        if isinstance(cause, ValidationError):
            if cause.errors()[0]["type"] == "value_error":
                return describe_validation_error(cause)  # written by this project
            return describe_validation_error(cause).replace("Input should", "should") + but_got
    if choices := re.search(r"Literal\[(.*?)\]", message):
        return f"should be one of {choices[1]}{but_got}"
    if "<class 'tuple'>" in message:
        return f"should be a list such as '[a,b]'{but_got}"
    if expected := re.search(r"Expected an? <class '(\w+)'>", message):
        return f"should be of type {expected[1]}{but_got}"
    return one_line(re.sub(r"Problem with given class_path '\S*':", "", message))


def describe_validation_error(error: ValidationError) -> str:
    """The first pydantic error, preceded by its flag unless the message starts with one."""
    finding = error.errors()[0]
    where = ".".join(part for part in finding["loc"] if isinstance(part, str))
    message = finding["msg"].removeprefix("Value error, ")
    return message if message.startswith("--") or not where else f"{flag(where)}: {message}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__


def suggestion(wrong: str, flags: list[str]) -> str:
    """A hint with the flag closest to an unknown one; empty if none is close."""
    close = difflib.get_close_matches(wrong.split("=")[0], flags, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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
    """`text` without line breaks."""
    return " ".join(text.split())
