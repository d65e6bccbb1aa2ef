"""Every operator of the weight language against Python's, in numpy and in torch."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from weighted_mtp.schemas.weights.nodes import Call, ColumnRef, Constant, FormulaError
from weighted_mtp.schemas.weights.operators import COMPARISONS, OPERATORS, as_floats, constant, operate

X, Y = ColumnRef("x"), ColumnRef("y")
LEFT, RIGHT = [1.0, -2.0, 3.0, 0.0, 0.5], [2.0, 4.0, 0.0, 0.0, 0.5]
PYTHON: dict[str, Callable[[float, float], float]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda left, right: left / right if right else 0.0,
}
libraries = pytest.mark.parametrize(
    ("library", "array"), [(np, lambda values: np.array(values, np.float32)), (torch, torch.tensor)]
)


def test_every_operator_is_compared_with_python() -> None:
    assert PYTHON.keys() == OPERATORS.keys()


@libraries
@pytest.mark.parametrize("symbol", PYTHON)
def test_two_columns(symbol: str, library: Any, array: Callable) -> None:
    """A division by 0 gives 0."""
    found = OPERATORS[symbol].elementwise(library, array(LEFT), array(RIGHT))
    assert str(found.dtype).removeprefix("torch.") == "float32"
    assert found.tolist() == [float(PYTHON[symbol](left, right)) for left, right in zip(LEFT, RIGHT, strict=True)]


@libraries
@pytest.mark.parametrize("symbol", PYTHON)
def test_a_column_and_a_number(symbol: str, library: Any, array: Callable) -> None:
    elementwise = OPERATORS[symbol].elementwise
    assert elementwise(library, array(LEFT), 0.5).tolist() == [float(PYTHON[symbol](x, 0.5)) for x in LEFT]
    assert elementwise(library, 0.5, array(RIGHT)).tolist() == [float(PYTHON[symbol](0.5, x)) for x in RIGHT]


@libraries
def test_conditions_become_floats(library: Any, array: Callable) -> None:
    found = as_floats(array(LEFT) > 0)
    assert found.tolist() == [1, 0, 1, 0, 1]
    assert found.dtype == library.float32


def test_arithmetic_on_constants_gives_a_constant() -> None:
    two, three = Constant(2.0), Constant(3.0)
    assert operate("+", two, three) == Constant(5.0)
    assert operate("-", two, three) == Constant(-1.0)
    assert operate("*", two, three) == Constant(6.0)
    assert operate("/", three, two) == Constant(1.5)
    assert operate("+", X, two) == Call("+", (X, two))
    assert operate(">", X, Y) == Call(">", (X, Y))


@pytest.mark.parametrize(
    ("symbol", "left", "right", "message"),
    [
        ("/", X, Constant(0.0), "division by 0"),
        ("/", Constant(1.0), constant(-0.0), "division by 0"),
        *[(symbol, Constant(2.0), Constant(1.0), "compares two numbers") for symbol in COMPARISONS],
        ("*", Constant(1e30), Constant(1e30), "a number is too large"),
    ],
)
def test_what_has_no_result(symbol: str, left: Any, right: Any, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        operate(symbol, left, right)


def test_constants_fit_into_float32_and_have_one_zero() -> None:
    assert constant(1e38) == Constant(1e38)
    assert math.copysign(1, constant(-0.0).value) == 1
    for value in (1e39, -1e39, math.inf, math.nan):
        with pytest.raises(FormulaError, match="a number is too large"):
            constant(value)


@pytest.mark.parametrize(
    ("symbol", "left", "right", "expected"),
    [
        ("+", (1, 2), (-3, 5), (-2, 7)),
        ("-", (1, 2), (-3, 5), (-4, 5)),
        ("*", (-1, 2), (-3, 5), (-6, 10)),
        ("*", (0, math.inf), (0, math.inf), (0, math.inf)),
        ("/", (0, 1), (0, 1), (0, math.inf)),
        ("/", (0, 1), (-1, 1), (-math.inf, math.inf)),
        (">", (1, 2), (-3, 5), (0, 1)),
    ],
)
def test_bounds(symbol: str, left: tuple, right: tuple, expected: tuple) -> None:
    assert OPERATORS[symbol].bounds(left, right) == expected


def test_the_mean_of_a_product_follows_from_the_means_only_with_a_constant() -> None:
    assert OPERATORS["*"].is_linear((Constant(2.0), X))
    assert not OPERATORS["*"].is_linear((X, Y))
    assert OPERATORS["+"].is_linear((X, Y))
    assert OPERATORS["-"].is_linear((X, Y))
    assert not OPERATORS["/"].is_linear((X, Y))
