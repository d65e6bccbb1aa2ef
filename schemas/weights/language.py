"""The weight language: one line that turns score columns into a weight for each target token.

A formula is an expression of columns, numbers and `live`, the loss of the model in training, with `+ - * /`,
comparisons that give 1 or 0, and the functions below. Python's parser reads it; nothing of it is ever run as Python.

    normalise(top(loss_base - loss_reference, 0.6))
    interpolate(normalise(abs(long_short), by=sequence), 0.75)

`by` says over what a function looks at the values: `corpus` (the default), `batch` (the default of `live`), `sequence`,
or a column of labels, over the documents of the same label.
"""

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

LIVE = "live"
SCOPES = ("corpus", "batch", "sequence")
MAX_LENGTH = 10_000
MAX_DEPTH = 100
MAX_NUMBER = 1e38
"""Weights are float32."""
UNBOUNDED = (-math.inf, math.inf)
POSITIVE = (0.0, math.inf)


class FormulaError(ValueError):
    """What is wrong with a formula, in one line."""


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class Column:
    """The values of a column, or the losses of the model in training where the name is `live`."""

    name: str


@dataclass(frozen=True)
class Call:
    """A function or operator of some arguments.

    Attributes:
        function: a key of `FUNCTIONS`, or an operator as it is written.
        arguments: `Node`s, or what `training.weighting` puts in their place.
        numbers: what else it is given, in the order of `Function.numbers`.
        by: scope of a function that looks at more than one token; None for all others.
    """

    function: str
    arguments: tuple[Any, ...]
    numbers: tuple[float, ...] = ()
    by: str | None = None


Node = Number | Column | Call


@dataclass(frozen=True)
class Function:
    """What a function takes besides its first argument: numbers with their defaults (None: must be given), and `by`."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    scoped: bool = False


FUNCTIONS = {
    "abs": Function(),
    "negate": Function(),
    "relu": Function(),
    "exp": Function(),
    "sigmoid": Function(),
    "shift": Function({"amount": None}),
    "scale": Function({"factor": None}),
    "clip": Function({"low": -math.inf, "high": math.inf}),
    "interpolate": Function({"lam": None}),
    "top": Function({"fraction": None}, scoped=True),
    "rank": Function(scoped=True),
    "standardise": Function(scoped=True),
    "normalise": Function({"silent": 0.0}, scoped=True),
    "softmax": Function(scoped=True),
    "signed": Function(),
}
OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.GtE: ">=", ast.Gt: ">", ast.LtE: "<=", ast.Lt: "<",
}  # fmt: skip
COMPARISONS = (">=", ">", "<=", "<")
MAX_EXPONENT = 11.0
"""Beyond this, e^x does not fit into the float16 that derived values are ranked in."""


def parse(text: str) -> Node:
    """Read a formula.

    Raises:
        FormulaError: it is not one.
    """
    try:
        if len(text) > MAX_LENGTH:
            raise FormulaError(f"longer than {MAX_LENGTH:,} characters")
        node = _read(ast.parse(text.strip(), mode="eval").body)
    except FormulaError as error:
        raise FormulaError(f"'{_shortened(text)}': {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too deeply nested"
        raise FormulaError(f"'{_shortened(text)}': cannot be read ({reason})") from None
    if _depth(node) > MAX_DEPTH:
        raise FormulaError(f"'{_shortened(text)}': more than {MAX_DEPTH} operations inside each other")
    for inner in walk(node):
        if is_signed(inner) and inner is not node:
            raise FormulaError(f"'{_shortened(text)}': signed() goes around the whole formula")
    return node


def rename(text: str, names: Mapping[str, str]) -> str:
    """The text of a formula with other names for some columns."""
    tree = ast.parse(text.strip(), mode="eval")
    functions = [inner.func for inner in ast.walk(tree) if isinstance(inner, ast.Call)]
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Name) and not any(inner is function for function in functions):
            inner.id = names.get(inner.id, inner.id)
    return ast.unparse(tree)


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    yield node
    if isinstance(node, Call):
        for argument in node.arguments:
            yield from walk(argument)


def columns_of(node: Node) -> list[str]:
    """Names of the columns that are read for each token, in the order of their first use, without `live`."""
    names = [inner.name for inner in walk(node) if isinstance(inner, Column) and inner.name != LIVE]
    return list(dict.fromkeys(names))


def labels_of(node: Node) -> list[str]:
    """Names of the label columns that something is done `by`."""
    scopes = [inner.by for inner in walk(node) if isinstance(inner, Call) and inner.by is not None]
    return [name for name in dict.fromkeys(scopes) if name not in SCOPES]


def is_live(node: Node) -> bool:
    """Whether a formula depends on the model in training."""
    return any(inner == Column(LIVE) for inner in walk(node))


def is_signed(node: Node) -> bool:
    """Whether a formula says that its values are meant to be negative, too."""
    return isinstance(node, Call) and node.function == "signed"


def waits_for_batch(node: Node) -> bool:
    """Whether a value is known only when the batch is: it depends on `live`, or something is done by batch."""
    return any(inner == Column(LIVE) or (isinstance(inner, Call) and inner.by == "batch") for inner in walk(node))


def replaced(node: Node, column: str, other: str) -> Node:
    """The formula with another column in place of one."""
    if node == Column(column):
        return Column(other)
    if isinstance(node, Call):
        arguments = tuple(replaced(argument, column, other) for argument in node.arguments)
        return Call(node.function, arguments, node.numbers, node.by)
    return node


@dataclass(frozen=True)
class Stages:
    """A formula cut into what is known when.

    Attributes:
        stored: what the loader computes of each token.
        batch: what is then computed of the rows of a whole step, with columns "0", "1", ... for the values of `stored`.
        live: what is left to each forward pass, with columns "0", ... for those of `batch`; None if nothing is.
    """

    stored: tuple[Node, ...]
    batch: tuple[Node, ...]
    live: Node | None

    @classmethod
    def of(cls, node: Node) -> "Stages":
        """Cut a formula; one that waits for nothing is `stored` as a whole."""
        rest, stored = _cut(node, waits_for_batch)
        if not is_live(node):
            return cls(stored, (rest,), None)
        live, batch = _cut(rest, is_live)
        return cls(stored, batch, live)


def _cut(node: Node, waits: Callable[[Node], bool]) -> tuple[Node, tuple[Node, ...]]:
    """What waits, with columns "0", "1", ... in place of its parts that do not, and these parts."""
    parts: dict[Node, Column] = {}

    def cut(node: Node) -> Node:
        if isinstance(node, Number):
            return node
        if not waits(node):
            return parts.setdefault(node, Column(str(len(parts))))
        if isinstance(node, Column):
            return node
        return Call(node.function, tuple(map(cut, node.arguments)), node.numbers, node.by)

    return cut(node), tuple(parts)


def mean_of(node: Node) -> float | None:
    """The mean that a formula has over every batch (and its targets with a score), None where that is unknown."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Column):
        return None
    if node.function in ("normalise", "softmax"):
        return 1.0 if node.by in ("batch", "sequence") and _has_signal(node) else None
    if node.function in ("+", "-", "*"):
        one, other = (mean_of(argument) for argument in node.arguments)
        if one is None or other is None:
            return None
        if node.function == "*":
            return one * other if any(isinstance(argument, Number) for argument in node.arguments) else None
        return one + other if node.function == "+" else one - other
    return None


def _has_signal(node: Node) -> bool:
    """Whether values are never 0 for all tokens of a sequence or batch but by a coincidence of all digits."""
    if not isinstance(node, Call):
        return node == Column(LIVE)
    if node.function == "normalise":
        return node.numbers == (1.0,) or _has_signal(node.arguments[0])
    if node.function == "top":
        return node.numbers[1] == 0 or _has_signal(node.arguments[0])
    return node.function in ("abs", "exp", "sigmoid", "rank", "softmax")


def _is_magnitude(node: Node) -> bool:
    """Whether values are not negative, as far as the formula alone tells, so that 0 is the least there is."""
    if isinstance(node, Number):
        return node.value >= 0
    if isinstance(node, Column):
        return node.name == LIVE
    if node.function in ("+", "*", "/"):
        return all(map(_is_magnitude, node.arguments))
    if node.function == "clip":
        return node.numbers[0] >= 0 or (_is_magnitude(node.arguments[0]) and node.numbers[1] >= 0)
    return node.function not in ("-", "standardise", "signed")


def bounds(node: Node, of_column: Callable[[str], tuple[float, float]]) -> tuple[float, float]:
    """The least and the largest value that a formula can have.

    Args:
        node: the formula.
        of_column: the same for a column.

    Raises:
        FormulaError: something is normalised that may be negative.
    """
    if isinstance(node, Number):
        return node.value, node.value
    if isinstance(node, Column):
        return POSITIVE if node.name == LIVE else of_column(node.name)
    inner = [bounds(argument, of_column) for argument in node.arguments]
    low, high = inner[0]
    match node.function:
        case "+":
            return low + inner[1][0], high + inner[1][1]
        case "-":
            return low - inner[1][1], high - inner[1][0]
        case "*":
            products = [_product(one, other) for one in inner[0] for other in inner[1]]
            return min(products), max(products)
        case "/":
            return POSITIVE if low >= 0 and inner[1][0] >= 0 else UNBOUNDED
        case "abs":
            return max(0.0, low, -high), max(abs(low), abs(high))
        case "clip":
            least, most = node.numbers
            return min(max(low, least), most), min(max(high, least), most)
        case "normalise":
            if low < 0:
                raise FormulaError("normalise() of what may be negative; put abs(), relu() or softmax() around it")
            return POSITIVE
        case "standardise":
            return UNBOUNDED
        case "exp" | "softmax":
            return POSITIVE
        case "signed":
            return low, high
    return 0.0, 1.0  # comparisons, top, rank, sigmoid


def _product(one: float, other: float) -> float:
    return 0.0 if one == 0 or other == 0 else one * other


def _depth(node: Node) -> int:
    return 1 + max(map(_depth, node.arguments), default=0) if isinstance(node, Call) else 0


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _read(tree: ast.AST) -> Node:
    match tree:
        case ast.Constant(value=value):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise FormulaError(f"{value!r} is not a number")
            return _number(float(value) if value < 1e300 else math.inf)
        case ast.Name(id=name):
            return Column(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _combine("-", Number(0.0), _read(operand))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _read(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _combine(OPERATORS[type(op)], _read(left), _read(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            return _combine(OPERATORS[type(op)], _read(left), _read(right))
        case ast.Call(func=ast.Name(id=name)):
            return _read_call(name, tree)
    raise FormulaError(f"'{ast.unparse(tree)}' is not of the language; it has + - * /, comparisons and functions")


def _combine(operator: str, left: Node, right: Node) -> Node:
    if operator == "/" and right == Number(0.0):
        raise FormulaError("division by 0")
    if isinstance(left, Number) and isinstance(right, Number):
        one, other = left.value, right.value
        if operator in COMPARISONS:
            raise FormulaError("compares two numbers")
        results = {"+": one + other, "-": one - other, "*": one * other}
        return _number(results[operator] if operator in results else one / other)
    return Call(operator, (left, right))


def _number(value: float) -> Number:
    if not abs(value) <= MAX_NUMBER:
        raise FormulaError("a number is too large")
    return Number(value + 0.0)  # so that -0 is 0


def _read_call(name: str, tree: ast.Call) -> Node:
    if name == "log":
        return _logarithm([_read(argument) for argument in tree.args])
    if name not in FUNCTIONS:
        meant = get_close_matches(name, FUNCTIONS, n=1)
        raise FormulaError(f"no function {name}()" + (f"; did you mean {meant[0]}()?" if meant else ""))
    function = FUNCTIONS[name]
    usage = f"{name}({', '.join(['x', *function.numbers, *['by'] * function.scoped])})"
    given = {str(keyword.arg): keyword.value for keyword in tree.keywords}
    if len(given) < len(tree.keywords):
        raise FormulaError(f"{name}() is given the same argument twice")
    positional = list(tree.args)
    if not positional or len(positional) > 1 + len(function.numbers):
        raise FormulaError(f"{name}() takes {usage}")
    argument = _read(positional[0])
    by = _scope(given.pop("by")) if "by" in given and function.scoped else None
    for key, value in zip(function.numbers, positional[1:], strict=False):
        if key in given:
            raise FormulaError(f"{name}() is given {key} twice")
        given[key] = value
    if unknown := given.keys() - function.numbers.keys():
        raise FormulaError(f"{name}() takes {usage}, not {min(unknown)}")
    numbers = []
    for key, default in function.numbers.items():
        number = _read(given[key]) if key in given else None if default is None else Number(default)
        if not isinstance(number, Number):
            raise FormulaError(f"{name}() needs a number for {key}: {usage}")
        numbers.append(number.value)
    if function.scoped:
        if not any(isinstance(inner, Column) for inner in walk(argument)):
            raise FormulaError(f"{name}() of a number")
        by = by or ("batch" if waits_for_batch(argument) else "corpus")
        if waits_for_batch(argument) and by not in ("batch", "sequence"):
            raise FormulaError(f"{name}(by={by}) of what is known for the batch at hand only; use by=batch or sequence")
        if by not in SCOPES and name != "standardise":
            raise FormulaError(f"{name}(by={by}): is one of {', '.join(SCOPES)}; only standardise() goes by labels")
        if by not in SCOPES and any(isinstance(inner, Call) and inner.by for inner in walk(argument)):
            raise FormulaError(f"standardise(by={by}) of what is compared with other tokens already")
    return _make(name, argument, tuple(numbers), by)


def _make(name: str, x: Node, numbers: tuple[float, ...], by: str | None) -> Node:
    """A call; some functions are another way to write operators."""
    match name:
        case "negate":
            return _combine("-", Number(0.0), x)
        case "relu":
            return Call("clip", (x,), (0.0, math.inf))
        case "shift":
            return _combine("+", x, Number(numbers[0]))
        case "scale":
            return _combine("*", Number(numbers[0]), x)
        case "interpolate":
            if not 0 <= numbers[0] <= 1:
                raise FormulaError("interpolate() needs lam from 0 to 1")
            return _combine("+", Number(numbers[0]), _combine("*", Number(1 - numbers[0]), x))
        case "top":
            if not 0 < numbers[0] <= 1:
                raise FormulaError("top() needs a fraction above 0 and not above 1")
            numbers = (*numbers, float(_is_magnitude(x)))  # of magnitudes 0 is never among the top
        case "normalise" if numbers[0] < 0:
            raise FormulaError("normalise() needs silent not below 0")
        case "clip" if numbers[0] > numbers[1]:
            raise FormulaError("clip() needs low not above high")
    return Call(name, (x,), numbers, by)


def _scope(tree: ast.AST) -> str:
    if not isinstance(tree, ast.Name):
        raise FormulaError(f"by={ast.unparse(tree)}: is one of {', '.join(SCOPES)}, or a column of labels")
    return tree.id


def _logarithm(arguments: list[Node]) -> Number:
    match arguments:
        case [Number(value=value)] if value > 0:
            return Number(math.log(value))
    raise FormulaError("log() takes one number above 0")
