"""Static properties of a formula: its bounds, sign, signal and mean."""

from collections.abc import Callable

import numpy as np

from weighted_mtp.schemas.weights.function_record import POSITIVE, Bounds
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.schemas.weights.nodes import LIVE, Call, ColumnRef, Constant, Node


def bounds(node: Node, of_column: Callable[[str], Bounds]) -> Bounds:
    """Smallest and largest possible value of a formula.

    Args:
        node: the formula.
        of_column: bounds of a column, by name.

    Raises:
        FormulaError: the argument of normalise() may be negative.
    """
    match node:
        case Constant(value):
            return value, value
        case ColumnRef(name):
            return POSITIVE if name == LIVE else of_column(name)
    arguments = [bounds(argument, of_column) for argument in node.arguments]
    return FUNCTIONS[node.function].bounds(*arguments, *node.numbers)


def is_magnitude(node: Node) -> bool:
    """Whether the formula guarantees non-negative values."""
    match node:
        case Constant(value):
            return value >= 0
        case ColumnRef(name):
            return name == LIVE
    return FUNCTIONS[node.function].is_magnitude(*map(is_magnitude, node.arguments), *node.numbers)


def has_signal(node: Node) -> bool:
    """Whether the values of a sequence or batch are never all 0, except by coincidence."""
    if not isinstance(node, Call):
        return node == ColumnRef(LIVE)
    return FUNCTIONS[node.function].has_signal(*map(has_signal, node.arguments), *node.numbers)


def mean_of(node: Node) -> float | None:
    """Mean of a formula over the scored targets of every batch; None if unknown."""
    match node:
        case Constant(value):
            return value
        case ColumnRef():
            return None
    function = FUNCTIONS[node.function]
    if function.mean_one:
        return 1.0 if node.by in ("batch", "sequence") and has_signal(node) else None
    means = [mean_of(argument) for argument in node.arguments]
    if function.elementwise is None or None in means or not function.is_linear(node.arguments):
        return None
    return function.elementwise(np, *means)
