"""Splits a formula into stages according to when its inputs become available."""

from collections.abc import Callable
from dataclasses import dataclass

from weighted_mtp.schemas.weights.nodes import Call, ColumnRef, Constant, Node, is_live, waits_for_batch


@dataclass(frozen=True)
class StagedFormula:
    """A formula split by when it can be evaluated. Each stage reads the results of the previous one as columns.

    Attributes:
        stored: components evaluated by the loader from stored columns.
        batch: components evaluated over the rows of a whole step; columns "0", "1", ... are the results of `stored`.
        live: the rest, evaluated in each forward pass; columns "0", "1", ... are the results of `batch`. None if the
            formula is not live.
    """

    stored: tuple[Node, ...]
    batch: tuple[Node, ...]
    live: Node | None

    @classmethod
    def split(cls, node: Node) -> "StagedFormula":
        """Split a formula. If it does not wait for the batch, all of it is in `stored`."""
        rest, stored = _split_off(node, waits_for_batch)
        if not is_live(node):
            return cls(stored, (rest,), None)
        live, batch = _split_off(rest, is_live)
        return cls(stored, batch, live)


def _split_off(node: Node, waits: Callable[[Node], bool]) -> tuple[Node, tuple[Node, ...]]:
    """Replace the largest components that do not wait by columns "0", "1", ...; return the formula and components."""
    components: dict[Node, ColumnRef] = {}

    def substitute(node: Node) -> Node:
        if isinstance(node, Constant):
            return node
        if not waits(node):
            return components.setdefault(node, ColumnRef(str(len(components))))
        if isinstance(node, ColumnRef):
            return node
        return Call(node.function, tuple(map(substitute, node.arguments)), node.numbers, node.by)

    return substitute(node), tuple(components)
