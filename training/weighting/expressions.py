"""Formulas with the corpus statistics substituted, and their evaluation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from weighted_mtp.schemas.shard_set.rounding import Float16Table
from weighted_mtp.schemas.weights.function_record import Segments
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.schemas.weights.nodes import Call, ColumnRef, Constant, Node


@dataclass(frozen=True, eq=False)
class TableLookup:
    """A function of one value, tabulated over float16: `table[bits of the argument]`.

    Attributes:
        argument: usually a column.
        table: (65536,) float32.
    """

    argument: "Expression"
    table: np.ndarray

    @cached_property
    def by_value(self) -> Float16Table:
        """The table for float32 values."""
        return Float16Table(self.table)


@dataclass(frozen=True, eq=False)
class ElementwiseMap:
    """A function of one value with corpus statistics substituted."""

    argument: "Expression"
    function: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class StandardiseByLabel:
    """`(argument - mean) * inverse`, with the statistics of the label of the token's document.

    Attributes:
        argument: a number per document.
        label: the label column.
        index: index of each label in the statistics.
        mean: (labels,) float32.
        inverse: (labels,) float32, 1 / standard deviation, or 0 if the deviation is 0.
    """

    argument: "Expression"
    label: str
    index: Mapping[str, int]
    mean: np.ndarray
    inverse: np.ndarray


Expression = Node | TableLookup | ElementwiseMap | StandardiseByLabel


@dataclass(frozen=True)
class Tokens:
    """The tokens on which expressions are evaluated: N tokens in S sequences.

    Attributes:
        columns: (N,) values of each column, by name: numpy float32, or tensors.
        segments: segments of the tokens, by scope.
        labels: (S,) label of each sequence, by label column.
        library: `numpy` or `torch`, the library of the values.
    """

    columns: Mapping[str, Any]
    segments: Mapping[str, Segments]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    library: ModuleType = np


def columns_read(expression: Expression) -> list[str]:
    """Names of the columns that an expression reads, label columns included, in order of first use."""
    return list(dict.fromkeys(_columns_read(expression)))


def _columns_read(expression: Expression) -> Iterator[str]:
    match expression:
        case ColumnRef(name):
            yield name
        case TableLookup(argument) | ElementwiseMap(argument):
            yield from _columns_read(argument)
        case StandardiseByLabel(argument, label):
            yield from _columns_read(argument)
            yield label
        case Call(_, arguments):
            for argument in arguments:
                yield from _columns_read(argument)


def fold(call: Call) -> Expression:
    """Fold a call into a table or constant, if it is elementwise in one tabulated value and constants."""
    values = [
        a.table if isinstance(a, TableLookup) else a.value if isinstance(a, Constant) else None for a in call.arguments
    ]
    tabulated = {argument.argument for argument in call.arguments if isinstance(argument, TableLookup)}
    if any(value is None for value in values) or len(tabulated) > 1:
        return call
    with np.errstate(all="ignore"):  # no scored token is NaN or infinite
        result = _elementwise(call, values, np)
    return TableLookup(tabulated.pop(), result.astype(np.float32)) if tabulated else Constant(float(result))


def map_values(x: Expression, function: Callable[[np.ndarray], np.ndarray]) -> Expression:
    """Apply an elementwise function to an expression; a table stays a table."""
    if not isinstance(x, TableLookup):
        return ElementwiseMap(x, function)
    with np.errstate(all="ignore"):
        return TableLookup(x.argument, function(x.table).astype(np.float32))


def evaluate_expression(expression: Expression, tokens: Tokens) -> Any:
    """Values (N,) float32 of an expression; a float if it is constant."""
    match expression:
        case Constant(value):
            return value
        case ColumnRef(name):
            return tokens.columns[name]
        case TableLookup(argument):
            return expression.by_value.look_up(evaluate_expression(argument, tokens))
        case ElementwiseMap(argument, function):
            return function(evaluate_expression(argument, tokens))
        case StandardiseByLabel():
            index = np.fromiter(map(expression.index.__getitem__, tokens.labels[expression.label]), np.int64)  # (S,)
            broadcast = tokens.segments["sequence"].broadcast
            centred = evaluate_expression(expression.argument, tokens) - broadcast(expression.mean[index])
            return centred * broadcast(expression.inverse[index])
    arguments = [evaluate_expression(argument, tokens) for argument in expression.arguments]
    if expression.by is None:
        return _elementwise(expression, arguments, tokens.library)
    in_segments = FUNCTIONS[expression.function].in_segments
    assert in_segments is not None
    return in_segments(tokens.library, tokens.segments[expression.by], *arguments, *expression.numbers)


def _elementwise(call: Call, arguments: list[Any], library: ModuleType) -> Any:
    elementwise = FUNCTIONS[call.function].elementwise
    assert elementwise is not None
    return elementwise(library, *arguments, *call.numbers)
