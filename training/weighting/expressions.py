"""Formulas with numbers in place of what had to be found out about the corpus, and their values for some tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from weighted_mtp.schemas.weights.language import COMPARISONS, MAX_EXPONENT, Call, Column, Node, Number
from weighted_mtp.training.weighting.segments import Segments, half_bits

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The value of each bit pattern of float16, (65536,) float32."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """A function of one value: `table[bits]`, with the bits of the value as float16 stores it.

    Attributes:
        of: what it is a function of, a column as a rule.
        table: (65536,) float32.
    """

    of: "Expression"
    table: np.ndarray


@dataclass(frozen=True, eq=False)
class ByLabel:
    """`(x - shift) * scale`, with shift and scale of the label of the token's document.

    Attributes:
        of: x.
        label: column of labels.
        numbers: number of each label.
        shift: (labels,) float32.
        scale: (labels,) float32.
    """

    of: "Expression"
    label: str
    numbers: Mapping[str, int]
    shift: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Ranked:
    """The rank of a value among those of the corpus.

    Attributes:
        of: the value.
        values: (D,) all values there are, ascending float32.
        shares: (D,) float32, share of the tokens whose value is not larger.
    """

    of: "Expression"
    values: np.ndarray
    shares: np.ndarray


Expression = Node | Lookup | ByLabel | Ranked


@dataclass(frozen=True)
class Tokens:
    """What expressions are made of, for some tokens.

    Attributes:
        columns: (N,) values of each column by name, numpy float16 or float32, or tensors.
        segments: of the tokens, by scope.
        labels: (S,) label of each sequence, by label column.
        library: `numpy` or `torch`, where the values are from.
    """

    columns: Mapping[str, Any]
    segments: Mapping[str, Segments]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    library: ModuleType = np


def columns_read(expression: Expression) -> Iterator[str]:
    """Names of the columns that an expression is made of, those of labels too; some more than once."""
    match expression:
        case Column(name):
            yield name
        case Lookup(of) | Ranked(of):
            yield from columns_read(of)
        case ByLabel(of, label):
            yield from columns_read(of)
            yield label
        case Call(_, arguments):
            for argument in arguments:
                yield from columns_read(argument)


def fold(call: Call) -> Expression:
    """The same with a table in place of what depends on one value alone."""
    values = [a.table if isinstance(a, Lookup) else a.value if isinstance(a, Number) else None for a in call.arguments]
    bases = {argument.of for argument in call.arguments if isinstance(argument, Lookup)}
    if any(value is None for value in values) or len(bases) > 1:
        return call
    with np.errstate(all="ignore"):  # of NaN and infinity, which no scored token has
        result = _elementwise(call, values, np)
    return Lookup(bases.pop(), result.astype(np.float32)) if bases else Number(float(result))


def evaluate(expression: Expression, tokens: Tokens) -> Any:
    """Values (N,) float32 of an expression; a float where it is a number."""
    match expression:
        case Number(value):
            return value
        case Column(name):
            values = tokens.columns[name]
            return values.astype(np.float32) if values.dtype == np.float16 else values
        case Lookup(of, table):
            values = tokens.columns[of.name] if isinstance(of, Column) else evaluate(of, tokens)
            return table[half_bits(values)]
        case Ranked(of, values, shares):
            return shares[np.searchsorted(values, evaluate(of, tokens))]
        case ByLabel():
            numbers = np.fromiter(map(expression.numbers.__getitem__, tokens.labels[expression.label]), np.int64)
            spread = tokens.segments["sequence"].spread
            centred = evaluate(expression.of, tokens) - spread(expression.shift[numbers])
            return centred * spread(expression.scale[numbers])
    arguments = [evaluate(argument, tokens) for argument in expression.arguments]
    if expression.by is not None:
        return _in_segments(expression, arguments[0], tokens.segments[expression.by], tokens.library)
    return _elementwise(expression, arguments, tokens.library)


def _elementwise(call: Call, arguments: list[Any], library: ModuleType) -> Any:
    first, *others = arguments
    match call.function:
        case "+":
            return first + others[0]
        case "-":
            return first - others[0]
        case "*":
            return first * others[0]
        case "/":
            return _quotient(first, others[0], library)
        case "abs":
            return abs(first)
        case "exp":
            return library.exp(library.clip(first, None, MAX_EXPONENT))
        case "sigmoid":
            return (library.tanh(first * 0.5) + 1) * 0.5
        case "clip":
            return library.clip(first, *call.numbers)
        case "signed":
            return first
    assert call.function in COMPARISONS
    match call.function:
        case ">=":
            return _floats(first >= others[0])
        case ">":
            return _floats(first > others[0])
        case "<=":
            return _floats(first <= others[0])
    return _floats(first < others[0])


def _quotient(one: Any, other: Any, library: ModuleType) -> Any:
    """`one / other`, and 0 where `other` is."""
    if isinstance(other, float):
        return one / other
    zero = other == 0
    return library.where(zero, 0, one / library.where(zero, 1, other))


def _floats(condition: Any) -> Any:
    return condition.astype(np.float32) if isinstance(condition, np.ndarray) else condition.float()


def _in_segments(call: Call, values: Any, segments: Segments, library: ModuleType) -> Any:
    match call.function:
        case "top":
            return _floats(segments.top(values, *call.numbers))
        case "rank":
            return segments.rank(values)
        case "softmax":
            values = library.exp(values - segments.spread(segments.maxima(values)))
            silent = 0.0
        case "normalise":
            [silent] = call.numbers
        case "standardise":
            counts = _at_least_one(segments.counts)
            values = values - segments.spread(segments.sums(values) / counts)
            deviations = library.sqrt(segments.sums(values * values) / counts)
            return values * segments.spread(_inverse(deviations, library))
    sums = segments.sums(values)
    values = values * segments.spread(segments.counts * _inverse(sums, library))
    if silent:
        values = values + segments.spread(library.where(sums == 0, silent, 0.0))
    return values


def _at_least_one(counts: Any) -> Any:
    return counts.clip(min=1)


def _inverse(values: Any, library: ModuleType) -> Any:
    """`1 / values`, and 0 where they are 0."""
    return library.where(values == 0, 0, 1 / library.where(values == 0, 1, values))
