"""Syntax tree of a formula in the weight language."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LIVE = "live"
"""Name of the loss of the model in training."""
SCOPES = ("corpus", "batch", "sequence")


class FormulaError(ValueError):
    """An invalid formula; the message is one line."""


@dataclass(frozen=True)
class Constant:
    """A number."""

    value: float


@dataclass(frozen=True)
class ColumnRef:
    """A column; `live` is the loss of the model in training."""

    name: str


@dataclass(frozen=True)
class Call:
    """A function or operator applied to arguments.

    Attributes:
        function: a key of `schemas.weights.functions.FUNCTIONS`.
        arguments: `Node`s, or the expressions that `training.weighting` substitutes for them.
        numbers: its numeric parameters, in the order of `Function.numbers`.
        by: scope of a function that compares tokens, None for other functions.
    """

    function: str
    arguments: tuple[Any, ...]
    numbers: tuple[float, ...] = ()
    by: str | None = None


Node = Constant | ColumnRef | Call


def walk_nodes(node: Node) -> Iterator[Node]:
    """The node and all nodes below it."""
    yield node
    if isinstance(node, Call):
        for argument in node.arguments:
            yield from walk_nodes(argument)


def depth(node: Node) -> int:
    """Number of nested calls."""
    return 1 + max(map(depth, node.arguments), default=0) if isinstance(node, Call) else 0


def columns_of(node: Node) -> list[str]:
    """Names of the columns read by a formula, in order of first use, without `live`."""
    names = [inner.name for inner in walk_nodes(node) if isinstance(inner, ColumnRef) and inner.name != LIVE]
    return list(dict.fromkeys(names))


def labels_of(node: Node) -> list[str]:
    """Names of the label columns in the `by` arguments of a formula."""
    scopes = [inner.by for inner in walk_nodes(node) if isinstance(inner, Call) and inner.by is not None]
    return [name for name in dict.fromkeys(scopes) if name not in SCOPES]


def is_live(node: Node) -> bool:
    """Whether a formula depends on the model in training."""
    return any(inner == ColumnRef(LIVE) for inner in walk_nodes(node))


def is_signed(node: Node) -> bool:
    """Whether a formula declares that its weights may be negative."""
    return isinstance(node, Call) and node.function == "signed"


def waits_for_batch(node: Node) -> bool:
    """Whether a formula needs the whole batch: it depends on `live`, or compares tokens by batch."""
    return any(
        inner == ColumnRef(LIVE) or (isinstance(inner, Call) and inner.by == "batch") for inner in walk_nodes(node)
    )


def replace_column(node: Node, name: str, other: str) -> Node:
    """The formula with column `other` instead of column `name`."""
    if node == ColumnRef(name):
        return ColumnRef(other)
    if isinstance(node, Call):
        arguments = tuple(replace_column(argument, name, other) for argument in node.arguments)
        return Call(node.function, arguments, node.numbers, node.by)
    return node
