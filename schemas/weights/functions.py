"""The functions of the weight language: `FUNCTIONS` has a record for each function and operator."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from weighted_mtp.schemas.weights.distribution import Distribution
from weighted_mtp.schemas.weights.function_record import (
    NO,
    POSITIVE,
    UNBOUNDED,
    YES,
    Bounds,
    Function,
    Segments,
    always,
)
from weighted_mtp.schemas.weights.nodes import Call, Constant, FormulaError, Node
from weighted_mtp.schemas.weights.operators import OPERATORS, as_floats, operate

Elementwise = Callable[[np.ndarray], np.ndarray]
MAX_EXPONENT = 11.0
"""For larger x, e^x overflows float16, in which expressions of several columns are counted over the corpus."""


def _log(x: Node) -> Node:
    if not isinstance(x, Constant) or x.value <= 0:
        raise FormulaError("log() takes one number above 0")
    return Constant(math.log(x.value))


def _relu(x: Node) -> Node:
    return Call("clip", (x,), (0.0, math.inf))


def _interpolate(x: Node, lam: float) -> Node:
    return operate("+", Constant(lam), operate("*", Constant(1 - lam), x))


def _exp(library: ModuleType, x: Any) -> Any:
    return library.exp(library.clip(x, None, MAX_EXPONENT))


def _abs_bounds(x: Bounds) -> Bounds:
    low, high = x
    return max(0.0, low, -high), max(abs(low), abs(high))


def _clip_bounds(x: Bounds, low: float, high: float) -> Bounds:
    return min(max(x[0], low), high), min(max(x[1], low), high)


def _top_over_corpus(distribution: Distribution, fraction: float, of_magnitudes: float) -> Elementwise:
    threshold = distribution.threshold(fraction)
    if of_magnitudes and threshold == 0 and fraction < 1:
        return lambda x: as_floats(x > threshold)
    return lambda x: as_floats(x >= threshold)


def _rank_over_corpus(distribution: Distribution) -> Elementwise:
    values, shares = distribution.values.astype(np.float32), distribution.ranks.astype(np.float32)
    return lambda x: shares[np.searchsorted(values, x).clip(max=len(shares) - 1)]


def _standardise(library: ModuleType, segments: Segments, x: Any) -> Any:
    counts = segments.counts.clip(min=1)
    x = x - segments.broadcast(segments.sums(x) / counts)
    x = x * segments.broadcast(_inverse(library, segments.maxima(abs(x))))  # squares neither overflow nor vanish
    deviations = library.sqrt(segments.sums(x * x) / counts)
    return x * segments.broadcast(_inverse(library, deviations))


def _standardise_over_corpus(distribution: Distribution) -> Elementwise:
    mean, inverse = distribution.mean, 1 / distribution.deviation if distribution.deviation else 0.0
    return lambda x: (x - mean) * inverse


def _normalise(library: ModuleType, segments: Segments, x: Any, silent: float) -> Any:
    sums = segments.sums(x)
    x = x * segments.broadcast(segments.counts * _inverse(library, sums))
    return x + segments.broadcast(library.where(sums == 0, silent, 0.0)) if silent else x


def _normalise_over_corpus(distribution: Distribution, silent: float) -> Elementwise:
    if distribution.mean == 0:
        raise FormulaError("is never positive, so --weights are 0 for every token")
    inverse = 1 / distribution.mean
    return lambda x: x * inverse


def _normalise_bounds(x: Bounds, silent: float) -> Bounds:
    if x[0] < 0:
        raise FormulaError("normalise() of values that may be negative; wrap them in abs(), relu() or softmax()")
    return POSITIVE


def _softmax(library: ModuleType, segments: Segments, x: Any) -> Any:
    return _normalise(library, segments, library.exp(x - segments.broadcast(segments.maxima(x))), silent=0.0)


def _softmax_over_corpus(distribution: Distribution) -> Elementwise:
    largest = float(distribution.values[-1])
    inverse = 1 / Distribution(np.exp(distribution.values - largest), distribution.counts).mean
    return lambda x: _exp(np, x - largest) * inverse


def _inverse(library: ModuleType, values: Any) -> Any:
    """`1 / values`, and 0 where they are 0."""
    return library.where(values == 0, 0, 1 / library.where(values == 0, 1, values))


FUNCTIONS: dict[str, Function] = OPERATORS | {
    "log": Function(expand=_log),
    "abs": Function(elementwise=lambda library, x: abs(x), bounds=_abs_bounds, has_signal=YES),
    "relu": Function(expand=_relu),
    "exp": Function(elementwise=_exp, bounds=always(POSITIVE), has_signal=YES),
    "sigmoid": Function(elementwise=lambda library, x: (library.tanh(x * 0.5) + 1) * 0.5, has_signal=YES),
    "clip": Function(
        numbers={"low": -math.inf, "high": math.inf},
        needs="low not above high",
        allowed=lambda low, high: low <= high,
        elementwise=lambda library, x, low, high: library.clip(x, low, high),
        bounds=_clip_bounds,
        is_magnitude=lambda x, low, high: low >= 0 or (x and high >= 0),
    ),
    "interpolate": Function(
        numbers={"lam": None}, needs="lam from 0 to 1", allowed=lambda lam: 0 <= lam <= 1, expand=_interpolate
    ),
    "top": Function(
        numbers={"fraction": None},
        needs="a fraction above 0 and not above 1",
        allowed=lambda fraction: 0 < fraction <= 1,
        takes_magnitude=True,
        in_segments=lambda library, segments, x, *numbers: as_floats(segments.top(x, *numbers)),
        over_corpus=_top_over_corpus,
        has_signal=lambda x, fraction, of_magnitudes: of_magnitudes == 0 or x,
    ),
    "rank": Function(
        in_segments=lambda library, segments, x: segments.rank(x),
        over_corpus=_rank_over_corpus,
        has_signal=YES,
    ),
    "standardise": Function(
        in_segments=_standardise,
        over_corpus=_standardise_over_corpus,
        by_label=True,
        bounds=always(UNBOUNDED),
        is_magnitude=NO,
    ),
    "normalise": Function(
        numbers={"silent": 0.0},
        needs="silent not below 0",
        allowed=lambda silent: silent >= 0,
        in_segments=_normalise,
        over_corpus=_normalise_over_corpus,
        bounds=_normalise_bounds,
        has_signal=lambda x, silent: silent == 1 or x,
        mean_one=True,
    ),
    "softmax": Function(
        in_segments=_softmax,
        over_corpus=_softmax_over_corpus,
        bounds=always(POSITIVE),
        has_signal=YES,
        mean_one=True,
    ),
    "signed": Function(elementwise=lambda library, x: x, bounds=lambda x: x, is_magnitude=NO),
}
