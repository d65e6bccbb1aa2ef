"""The operators of the weight language."""

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from weighted_mtp.schemas.weights.function_record import NO, POSITIVE, UNBOUNDED, YES, Bounds, Function
from weighted_mtp.schemas.weights.nodes import Call, Constant, FormulaError, Node

MAX_NUMBER = 1e38
"""Largest constant; weights are float32."""


def as_floats(condition: Any) -> Any:
    """1.0 where a condition (array, tensor or bool) holds, else 0.0, float32."""
    return condition.float() if hasattr(condition, "float") else np.asarray(condition, dtype=np.float32)


def _quotient(library: ModuleType, left: Any, right: Any) -> Any:
    """`left / right`, and 0 where `right` is 0."""
    if isinstance(right, float):
        return left / right
    zero = right == 0
    return library.where(zero, 0, left / library.where(zero, 1, right))


def _product_bounds(left: Bounds, right: Bounds) -> Bounds:
    products = [0.0 if one == 0 or other == 0 else one * other for one in left for other in right]
    return min(products), max(products)


def _comparison(compare: Callable[[Any, Any], Any]) -> Function:
    return Function(elementwise=lambda library, left, right: as_floats(compare(left, right)))


COMPARISONS = {
    ">=": _comparison(operator.ge),
    ">": _comparison(operator.gt),
    "<=": _comparison(operator.le),
    "<": _comparison(operator.lt),
}
OPERATORS = COMPARISONS | {
    "+": Function(
        elementwise=lambda library, left, right: left + right,
        bounds=lambda left, right: (left[0] + right[0], left[1] + right[1]),
        is_magnitude=lambda left, right: left and right,
        is_linear=YES,
    ),
    "-": Function(
        elementwise=lambda library, left, right: left - right,
        bounds=lambda left, right: (left[0] - right[1], left[1] - right[0]),
        is_magnitude=NO,
        is_linear=YES,
    ),
    "*": Function(
        elementwise=lambda library, left, right: left * right,
        bounds=_product_bounds,
        is_magnitude=lambda left, right: left and right,
        is_linear=lambda arguments: any(isinstance(argument, Constant) for argument in arguments),
    ),
    "/": Function(
        elementwise=_quotient,
        bounds=lambda left, right: POSITIVE if left[0] >= 0 and right[0] >= 0 else UNBOUNDED,
        is_magnitude=lambda left, right: left and right,
    ),
}


def constant(value: float) -> Constant:
    """A constant.

    Raises:
        FormulaError: it is too large for a weight.
    """
    if not abs(value) <= MAX_NUMBER:
        raise FormulaError("a number is too large")
    return Constant(value + 0.0)  # -0.0 becomes 0.0


def operate(symbol: str, left: Node, right: Node) -> Node:
    """An operator applied to two formulas; arithmetic on two constants gives a constant.

    Raises:
        FormulaError: a division by 0, a comparison of two constants, or a result that is too large.
    """
    if symbol == "/" and right == Constant(0.0):
        raise FormulaError("division by 0")
    if not (isinstance(left, Constant) and isinstance(right, Constant)):
        return Call(symbol, (left, right))
    if symbol in COMPARISONS:
        raise FormulaError("compares two numbers")
    elementwise = OPERATORS[symbol].elementwise
    assert elementwise is not None
    return constant(elementwise(np, left.value, right.value))
