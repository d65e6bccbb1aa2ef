"""YAML of bounded size: aliases can make a small text large, and deep nesting overflows the stack of the parser."""

from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 20
"""Longest text."""
MOST_NODES = 10_000
"""Most values in a text, counting those behind an alias each time."""
MOST_DEPTH = 100
"""Most lists and mappings inside one another."""


def bounded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML that checks a text first."""

    def load_checked(text: str) -> Any:
        check_size(text)
        return load(text)

    return load_checked


def check_size(text: str) -> None:
    """Check the size of a YAML text, from its events and without building it.

    Raises:
        YAMLError: it is too large, too deep, or refers to itself, or is no YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"more than {MOST_CHARACTERS:,} characters")
    anchors: dict[str | None, int] = {}  # nodes of each finished anchor
    held = [0]  # nodes of each open list or mapping, and before them of the text
    names: list[str | None] = []  # anchor of each open list or mapping
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        nodes, name = 0, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            held.append(1)
            names.append(name)
        elif isinstance(event, yaml.CollectionEndEvent):
            nodes, name = held.pop(), names.pop()
        elif isinstance(event, yaml.AliasEvent):
            if name in names:
                raise error_at(event, f"'{name}' contains itself")
            nodes, name = anchors.get(name, 1), None
        elif isinstance(event, yaml.ScalarEvent):
            nodes = 1
        held[-1] += nodes
        if name is not None and nodes:
            anchors[name] = nodes
        if len(names) > MOST_DEPTH:
            raise error_at(event, f"nested more than {MOST_DEPTH} deep")
        if held[-1] > MOST_NODES:
            raise error_at(event, f"more than {MOST_NODES:,} values, aliases included")


def error_at(event: Any, problem: str) -> yaml.MarkedYAMLError:
    """A problem at the place of an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
