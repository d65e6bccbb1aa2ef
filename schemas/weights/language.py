"""The weight language: a one-line formula that turns score columns into a weight for each target token.

A formula is an expression of columns, numbers and `live`, the loss of the model in training, with `+ - * /`,
comparisons, which give 1 or 0, and the functions of `schemas.weights.functions`. Python's parser reads it, but it is
never executed as Python.

    normalise(top(loss_base - loss_reference, 0.6))
    interpolate(normalise(abs(long_short), by=sequence), 0.75)

`by` selects the tokens that a function compares: `corpus` (the default), `batch` (the default for `live`), `sequence`,
or a label column, for documents with the same label.
"""

import ast
import math
from collections.abc import Mapping
from difflib import get_close_matches

from weighted_mtp.schemas.text import printable
from weighted_mtp.schemas.weights.analysis import is_magnitude
from weighted_mtp.schemas.weights.function_record import Function
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.schemas.weights.nodes import (
    SCOPES,
    Call,
    ColumnRef,
    Constant,
    FormulaError,
    Node,
    depth,
    is_signed,
    waits_for_batch,
    walk_nodes,
)
from weighted_mtp.schemas.weights.operators import constant, operate

MAX_LENGTH = 10_000
MAX_DEPTH = 100
SYMBOLS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<",
}  # fmt: skip
FUNCTION_NAMES = ", ".join(sorted(name for name in FUNCTIONS if name.isidentifier()))


def parse_formula(text: str) -> Node:
    """Parse a formula.

    Raises:
        FormulaError: the formula is invalid.
    """
    shown = _shortened(text.strip())
    try:
        if len(text) > MAX_LENGTH:
            raise FormulaError(f"longer than {MAX_LENGTH:,} characters")
        node = _read(ast.parse(text.strip(), mode="eval").body)
        if depth(node) > MAX_DEPTH:
            raise FormulaError(f"more than {MAX_DEPTH} nested operations")
    except FormulaError as error:
        is_named = str(error).startswith(f"'{shown}' ")
        raise FormulaError(str(error) if is_named else f"'{shown}': {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        deep = isinstance(error, RecursionError | MemoryError)
        reason = error.msg if isinstance(error, SyntaxError) else "too deeply nested" if deep else "invalid characters"
        raise FormulaError(f"'{shown}': cannot be read ({reason})") from None
    for inner in walk_nodes(node):
        if is_signed(inner) and inner is not node:
            raise FormulaError(f"'{shown}': signed() must enclose the whole formula")
    return node


def rename(text: str, names: Mapping[str, str]) -> str:
    """The text of a formula with some columns renamed."""
    tree = ast.parse(text.strip(), mode="eval")
    functions = [inner.func for inner in ast.walk(tree) if isinstance(inner, ast.Call)]
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Name) and not any(inner is function for function in functions):
            inner.id = names.get(inner.id, inner.id)
    return ast.unparse(tree)


def _shortened(text: str) -> str:
    return printable(text if len(text) <= 100 else text[:97] + "...")


def _read(tree: ast.AST) -> Node:
    match tree:
        case ast.Constant(value=value):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FormulaError(f"{value!r} is not a number")
            return constant(float(value) if value < 1e300 else math.inf)
        case ast.Name(id=name):
            return ColumnRef(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return operate("-", Constant(0.0), _read(operand))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _read(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SYMBOLS:
            return operate(SYMBOLS[type(op)], _read(left), _read(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SYMBOLS:
            return operate(SYMBOLS[type(op)], _read(left), _read(right))
        case ast.Compare(ops=[_, _, *_]):
            raise FormulaError("a comparison has two sides; write (0 < x) * (x < 1) for 0 < x < 1")
        case ast.Call(func=ast.Name(id=name)):
            return _read_call(name, tree)
    raise FormulaError(
        f"'{_shortened(ast.unparse(tree))}' is not part of the language, which has columns, numbers, + - * /, "
        f"comparisons and the functions {FUNCTION_NAMES}"
    )


def _read_call(name: str, tree: ast.Call) -> Node:
    if name not in FUNCTIONS:
        meant = get_close_matches(name, FUNCTIONS, n=1)
        hint = f"; did you mean {meant[0]}()?" if meant else f"; choose from {FUNCTION_NAMES}"
        raise FormulaError(f"no function {name}(){hint}")
    function = FUNCTIONS[name]
    usage = f"{name}({', '.join(['x', *function.numbers, *['by'] * function.scoped])})"
    given = {str(keyword.arg): keyword.value for keyword in tree.keywords}
    if len(given) < len(tree.keywords):
        raise FormulaError(f"{name}() is given the same argument twice")
    if not 1 <= len(tree.args) <= 1 + len(function.numbers):
        raise FormulaError(f"{name}() takes {usage}")
    x = _read(tree.args[0])
    by = _read_scope(given.pop("by")) if "by" in given and function.scoped else None
    for key, value in zip(function.numbers, tree.args[1:], strict=False):
        if key in given:
            raise FormulaError(f"{name}() is given {key} twice")
        given[key] = value
    if unknown := given.keys() - function.numbers.keys():
        raise FormulaError(f"{name}() takes {usage}, not {min(unknown)}")
    numbers = _read_numbers(name, function, given, usage)
    if function.scoped:
        by = by or ("batch" if waits_for_batch(x) else "corpus")
        _check_scope(name, function, x, by)
    if not function.allowed(*numbers):
        raise FormulaError(f"{name}() needs {function.needs}")
    if function.expand is not None:
        return function.expand(x, *numbers)
    if function.takes_magnitude:
        numbers.append(float(is_magnitude(x)))
    return Call(name, (x,), tuple(numbers), by)


def _read_numbers(name: str, function: Function, given: Mapping[str, ast.AST], usage: str) -> list[float]:
    numbers = []
    for key, default in function.numbers.items():
        number = _read(given[key]) if key in given else None if default is None else Constant(default)
        if not isinstance(number, Constant):
            raise FormulaError(f"{name}() needs a number for {key}: {usage}")
        numbers.append(number.value)
    return numbers


def _read_scope(tree: ast.AST) -> str:
    if not isinstance(tree, ast.Name):
        raise FormulaError(f"by={ast.unparse(tree)}: must be one of {', '.join(SCOPES)}, or a label column")
    return tree.id


def _check_scope(name: str, function: Function, x: Node, by: str) -> None:
    if not any(isinstance(inner, ColumnRef) for inner in walk_nodes(x)):
        raise FormulaError(f"{name}() needs a column, not a number")
    if waits_for_batch(x) and by not in ("batch", "sequence"):
        raise FormulaError(f"{name}(by={by}): values are known only for the current batch; use by=batch or sequence")
    if by in SCOPES:
        return
    if not function.by_label:
        by_label = " or ".join(f"{key}()" for key, other in FUNCTIONS.items() if other.by_label)
        raise FormulaError(f"{name}(by={by}): must be one of {', '.join(SCOPES)}; only {by_label} takes a label column")
    if any(isinstance(inner, Call) and inner.by for inner in walk_nodes(x)):
        raise FormulaError(f"{name}(by={by}): the argument already compares tokens")
