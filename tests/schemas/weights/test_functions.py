"""Every function of the weight language against its formula, in numpy and in torch."""

import math
from collections.abc import Callable
from itertools import chain
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch

from weighted_mtp.schemas.weights.distribution import Distribution
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.schemas.weights.nodes import Call, ColumnRef, Constant, FormulaError
from weighted_mtp.schemas.weights.operators import OPERATORS
from weighted_mtp.training.weighting.segments import ArraySegments, TensorSegments

X = ColumnRef("x")
VALUES = [-30.0, -1.5, 0.0, 0.5, 2.0, 20.0]
SEGMENTS = [[0.5, 3.0, -1.0, 3.0], [2.0], [0.0, 0.0], [4.0, 0.0, 1.0]]
MAGNITUDES = [list(map(abs, segment)) for segment in SEGMENTS]

ELEMENTWISE: list[tuple[str, tuple[float, ...], Callable[[float], float]]] = [
    ("abs", (), abs),
    ("exp", (), lambda x: math.exp(min(x, 11))),
    ("sigmoid", (), lambda x: 1 / (1 + math.exp(-x))),
    ("clip", (-1.0, 2.0), lambda x: min(max(x, -1), 2)),
    ("clip", (0.0, math.inf), lambda x: max(x, 0)),
    ("signed", (), lambda x: x),
]


def top(fraction: float, of_magnitudes: bool) -> Callable[[list[float]], list[float]]:
    """The `ceil(fraction * n)` largest and those equal to them; a 0 is no signal."""

    def of_segment(values: list[float]) -> list[float]:
        if fraction == 1:
            return [1.0] * len(values)
        threshold = sorted(values, reverse=True)[math.ceil(fraction * len(values)) - 1]
        silent = not any(values)
        return [float(x >= threshold and not silent and not (of_magnitudes and x == 0)) for x in values]

    return of_segment


def rank(values: list[float]) -> list[float]:
    return [sum(other <= x for other in values) / len(values) for x in values]


def standardise(values: list[float]) -> list[float]:
    mean, deviation = fmean(values), pstdev(values)
    return [(x - mean) / deviation if deviation else 0 for x in values]


def normalise(silent: float) -> Callable[[list[float]], list[float]]:
    return lambda values: [x / fmean(values) if any(values) else silent for x in values]


def softmax(values: list[float]) -> list[float]:
    return [len(values) * math.exp(x) / sum(map(math.exp, values)) for x in values]


IN_SEGMENTS: list[tuple[str, tuple[float, ...], list[list[float]], Callable[[list[float]], list[float]]]] = [
    ("top", (0.5, 0.0), SEGMENTS, top(0.5, False)),
    ("top", (0.5, 1.0), MAGNITUDES, top(0.5, True)),
    ("top", (0.9, 1.0), MAGNITUDES, top(0.9, True)),
    ("top", (1.0, 1.0), MAGNITUDES, top(1.0, True)),
    ("rank", (), SEGMENTS, rank),
    ("standardise", (), SEGMENTS, standardise),
    ("normalise", (0.0,), MAGNITUDES, normalise(0.0)),
    ("normalise", (1.0,), MAGNITUDES, normalise(1.0)),
    ("softmax", (), SEGMENTS, softmax),
]


def of_array(values: list[float], lengths: list[int]) -> tuple[Any, Any, Any]:
    return np, ArraySegments(np.array(lengths)), np.array(values, np.float32)


def of_tensor(values: list[float], lengths: list[int]) -> tuple[Any, Any, Any]:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch, TensorSegments(index), torch.tensor(values)


both = pytest.mark.parametrize("place", [of_array, of_tensor])


def test_the_tables_of_this_file_name_every_function() -> None:
    expanded = {name for name, function in FUNCTIONS.items() if function.expand is not None}
    tested = {name for name, *_ in ELEMENTWISE} | {name for name, *_ in IN_SEGMENTS}
    assert tested | expanded == FUNCTIONS.keys() - OPERATORS.keys()
    assert expanded == {"log", "relu", "interpolate"}


@both
@pytest.mark.parametrize(("name", "numbers", "formula"), ELEMENTWISE)
def test_functions_of_each_token(place: Callable, name: str, numbers: tuple[float, ...], formula: Callable) -> None:
    library, _, x = place(VALUES, [len(VALUES)])
    found = FUNCTIONS[name].elementwise(library, x, *numbers)
    assert found.tolist() == pytest.approx([formula(value) for value in VALUES], rel=1e-5, abs=1e-6)


@both
@pytest.mark.parametrize(("name", "numbers", "segments", "formula"), IN_SEGMENTS)
def test_functions_that_compare_the_tokens_of_a_segment(
    place: Callable, name: str, numbers: tuple[float, ...], segments: list[list[float]], formula: Callable
) -> None:
    library, placed, x = place(list(chain(*segments)), list(map(len, segments)))
    found = FUNCTIONS[name].in_segments(library, placed, x, *numbers)
    expected = list(chain(*map(formula, segments)))
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "numbers", "segments", "formula"), IN_SEGMENTS)
def test_over_the_corpus_they_compare_all_tokens(
    name: str, numbers: tuple[float, ...], segments: list[list[float]], formula: Callable
) -> None:
    values = list(chain(*segments))
    x = np.array(values, np.float32)
    distribution = Distribution.from_values(x, np.ones(len(x), np.int64))
    found = FUNCTIONS[name].over_corpus(distribution, *numbers)(x)
    assert found.tolist() == pytest.approx(formula(values), rel=1e-5, abs=1e-6)


def test_a_corpus_without_signal_or_without_spread() -> None:
    zeros = Distribution(np.array([0.0]), np.array([3]))
    with pytest.raises(FormulaError, match="is never positive, so --weights are 0 for every token"):
        FUNCTIONS["normalise"].over_corpus(zeros, 0.0)
    assert FUNCTIONS["standardise"].over_corpus(zeros)(np.zeros(3)).tolist() == [0, 0, 0]
    assert FUNCTIONS["top"].over_corpus(zeros, 0.5, 1.0)(np.zeros(3)).tolist() == [0, 0, 0]


def test_abbreviations() -> None:
    assert FUNCTIONS["log"].expand(Constant(math.e)) == Constant(1.0)
    assert FUNCTIONS["relu"].expand(X) == Call("clip", (X,), (0.0, math.inf))
    expected = Call("+", (Constant(0.25), Call("*", (Constant(0.75), X))))
    assert FUNCTIONS["interpolate"].expand(X, 0.25) == expected
    for argument in (X, Constant(0.0), Constant(-1.0)):
        with pytest.raises(FormulaError, match=r"log\(\) takes one number above 0"):
            FUNCTIONS["log"].expand(argument)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("clip", [(0, 1), (1, 1)], [(2, 1)]),
        ("interpolate", [(0,), (1,)], [(-0.1,), (1.1,)]),
        ("top", [(1,), (1e-3,)], [(0,), (1.1,)]),
        ("normalise", [(0,), (2,)], [(-1,)]),
    ],
)
def test_numbers_that_a_function_allows(name: str, right: list[tuple], wrong: list[tuple]) -> None:
    assert all(FUNCTIONS[name].allowed(*numbers) for numbers in right)
    assert not any(FUNCTIONS[name].allowed(*numbers) for numbers in wrong)


@pytest.mark.parametrize(
    ("name", "numbers", "of_magnitude", "expected"),
    [
        ("abs", (), False, True),
        ("clip", (-1, 1), False, False),
        ("clip", (-1, 1), True, True),
        ("clip", (0, 1), False, True),
        ("clip", (-2, -1), True, False),
        ("standardise", (), True, False),
        ("signed", (), True, False),
    ],
)
def test_results_that_are_never_negative(name: str, numbers: tuple, of_magnitude: bool, expected: bool) -> None:
    assert FUNCTIONS[name].is_magnitude(of_magnitude, *numbers) is expected
