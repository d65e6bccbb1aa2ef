"""YAML of bounded size and one meaning.

Aliases can make a small text large, and deep nesting overflows the stack of the parser. YAML lets the last of two equal
keys win, and reads `0100` as 64 and `1:30` as 90.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 20
"""Longest text."""
MOST_NODES = 10_000
"""Most values in a text, counting those behind an alias each time."""
MOST_DEPTH = 100
"""Most lists and mappings inside one another."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
NOT_DECIMAL = re.compile(r"[-+]?0[0-9_]+$|.*:")
"""Octal and sexagesimal numbers of YAML 1.1."""


def bounded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML that checks a text first."""

    def load_checked(text: str) -> Any:
        check_size(text)
        check_meaning(text)
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
    for event in yaml.parse(text, Loader=LOADER):
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


def check_meaning(text: str) -> None:
    """Check that a YAML text sets nothing twice, and that its numbers are decimal.

    Raises:
        YAMLError: it does, or one is not.
    """
    root = yaml.compose(text, Loader=LOADER)
    nodes = {} if root is None else {id(root): root}
    pending = list(nodes.values())
    while pending:
        node = pending.pop()
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            check_keys([key for key, _ in node.value])
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and NOT_DECIMAL.match(node.value):
            raise error_at(node, f"'{node.value}' is read as a number that is not decimal; put it in quotes")
        new = {id(child): child for child in children if id(child) not in nodes}
        nodes |= new
        pending += new.values()


def check_keys(keys: list[Any]) -> None:
    """Raise YAMLError if a mapping has a key twice, or the key `a` besides `a.b`."""
    names = Counter(str(key.value) for key in keys)
    for key in keys:
        parts = str(key.value).split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        if names[str(key.value)] > 1 or any(parent in names for parent in parents):
            raise error_at(key, f"'{key.value}' is set twice")


def error_at(event: Any, problem: str) -> yaml.MarkedYAMLError:
    """A problem at the place of an event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
