"""Bounds and means that follow from a formula alone."""

import math

import pytest

from weighted_mtp.schemas.weights.analysis import bounds, mean_of
from weighted_mtp.schemas.weights.function_record import POSITIVE, UNBOUNDED
from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.schemas.weights.nodes import FormulaError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1.0),
        ("normalise(live, by=batch)", 1.0),
        ("softmax(live, by=sequence)", 1.0),
        ("interpolate(normalise(live, by=batch), 0.3)", 1.0),
        ("0.5 * normalise(live, by=batch) + 0.5 * softmax(x, by=sequence)", 1.0),
        ("normalise(x)", None),
        ("normalise(live, by=batch) * normalise(x, by=batch)", None),
        ("normalise(relu(live - 1), by=batch)", None),
        ("normalise(relu(live - 1), 1, by=batch)", 1.0),
        ("normalise(top(live - 1, 0.5), by=batch)", 1.0),
        ("normalise(top(relu(live - 1), 0.5), by=batch)", None),
        ("live", None),
        ("top(live, 0.5)", None),
    ],
)
def test_the_mean_over_a_batch_where_it_is_known(text: str, expected: float | None) -> None:
    assert mean_of(parse_formula(text)) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss", (0, math.inf)),
        ("score", UNBOUNDED),
        ("-loss", (-math.inf, 0)),
        ("abs(score)", (0, math.inf)),
        ("abs(clip(score, -3, 2))", (0, 3)),
        ("abs(clip(score, 1, 2))", (1, 2)),
        ("loss * loss + 1", (1, math.inf)),
        ("-loss * -loss", (0, math.inf)),
        ("2 - sigmoid(score)", (1, 2)),
        ("loss / loss", (0, math.inf)),
        ("loss / score", UNBOUNDED),
        ("exp(score)", (0, math.inf)),
        ("relu(score)", (0, math.inf)),
        ("clip(loss, -1, 1)", (0, 1)),
        ("score > 1", (0, 1)),
        ("top(score, 0.5) * rank(score)", (0, 1)),
        ("standardise(loss)", UNBOUNDED),
        ("signed(standardise(loss))", UNBOUNDED),
    ],
)
def test_bounds(text: str, expected: tuple[float, float]) -> None:
    assert bounds(parse_formula(text), lambda name: POSITIVE if name == "loss" else UNBOUNDED) == expected


def test_values_that_may_be_negative_are_not_normalised() -> None:
    with pytest.raises(FormulaError, match=r"normalise\(\) of values that may be negative; wrap them in abs\(\)"):
        bounds(parse_formula("normalise(score)"), lambda name: UNBOUNDED)
