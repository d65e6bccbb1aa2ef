"""Parsing of the weight language: valid formulas, and one-line errors for invalid ones."""

import math

import pytest

from weighted_mtp.schemas.weights.language import parse_formula, rename
from weighted_mtp.schemas.weights.nodes import Call, ColumnRef, Constant, FormulaError

X, Y = ColumnRef("x"), ColumnRef("y")


def test_operators_bind_as_in_python() -> None:
    assert parse_formula("x - y * 2") == Call("-", (X, Call("*", (Y, Constant(2.0)))))
    assert parse_formula("(x - y) / -2") == Call("/", (Call("-", (X, Y)), Constant(-2.0)))
    assert parse_formula(" 1 + 2 * 3 ") == Constant(7.0)
    assert parse_formula("x >= log(2)") == Call(">=", (X, Constant(math.log(2))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("relu(x)", "clip(x, low=0)"),
        ("interpolate(x, 0.75)", "0.75 + 0.25 * x"),
        ("top(x, 0.5)", "top(x, fraction=0.5, by=corpus)"),
        ("top(live - x, 0.5)", "top(live - x, 0.5, by=batch)"),
        ("normalise(x)", "normalise(x, 0, by=corpus)"),
    ],
)
def test_two_ways_to_write_the_same(one: str, other: str) -> None:
    assert parse_formula(one) == parse_formula(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("top(x", r"cannot be read \('\(' was never closed\)"),
        ("norm(x)", r"no function norm\(\); did you mean normalise\(\)\?"),
        ("negate(x)", r"no function negate\(\)"),
        ("shift(x, 2)", r"no function shift\(\)"),
        ("scale(x, 2)", r"no function scale\(\)"),
        ("log(2, 3)", r"log\(\) takes log\(x\)"),
        ("log(2, base=3)", r"log\(\) takes log\(x\), not base"),
        ("__import__('os')", "no function __import__"),
        ("x.y", "'x.y' is not part of the language"),
        ("x if y else 1", "is not part of the language"),
        ("x < y < 1", "a comparison has two sides"),
        ("[x]", "is not part of the language"),
        ("'x'", "'x' is not a number"),
        ("True * x", "True is not a number"),
        ("1e999", "a number is too large"),
        ("1 / 0", "division by 0"),
        ("x / 0", "division by 0"),
        ("1e39 * x", "a number is too large"),
        ("+".join("x" * 300), "more than 100 nested operations"),
        ("standardise(rank(x, by=sequence), by=prompt)", "the argument already compares tokens"),
        ("2 > 1", "compares two numbers"),
        ("top(x)", "needs a number for fraction"),
        ("top(x, y)", "needs a number for fraction"),
        ("top(x, 0)", "a fraction above 0 and not above 1"),
        ("top(x, 0.5, 0.5)", r"top\(\) takes top\(x, fraction, by\)"),
        ("top(x, 0.5, fraction=0.5)", "is given fraction twice"),
        ("top(x, fraction=0.5, k=3)", "not k"),
        ("top(1, 0.5)", r"top\(\) needs a column, not a number"),
        ("top(x, 0.5, by=3)", "by=3: must be one of corpus, batch, sequence"),
        ("top(x, 0.5, by=prompt)", r"only standardise\(\) takes a label column"),
        ("top(live, 0.5, by=corpus)", "known only for the current batch"),
        ("standardise(top(x, 0.5, by=batch), by=corpus)", "known only for the current batch"),
        ("abs(x, by=corpus)", r"abs\(\) takes abs\(x\), not by"),
        ("clip(x, 2, 1)", "low not above high"),
        ("top(x, 0.5, by=corpus, by=batch)", "cannot be read|the same argument twice"),
        ("interpolate(x, 2)", "lam from 0 to 1"),
        ("normalise(x, -1)", "silent not below 0"),
        ("log(0)", r"log\(\) takes one number above 0"),
        ("log(x)", r"log\(\) takes one number above 0"),
        ("1 + signed(x)", "must enclose the whole formula"),
        ("(" * 1000 + "x" + ")" * 1000, "cannot be read"),
        ("-" * 5000 + "x", "cannot be read"),
        ("x" * 20_000, "longer than 10,000 characters"),
        ("x\0", "cannot be read"),
    ],
)
def test_an_invalid_formula_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message) as error:
        parse_formula(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_columns_are_renamed_but_not_functions() -> None:
    names = {"loss_a": "loss_a_2", "top": "top_2", "y": "y_2"}
    assert rename("top(loss_a - top, 0.5, by=y) / y", names) == "top(loss_a_2 - top_2, 0.5, by=y_2) / y_2"
