"""Formulas that once ended in something else than one line."""

import re
from pathlib import Path

import pytest

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.weighting.token_weights import token_weights


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        ("a\nb", r"'a\\nb': cannot be read \(invalid syntax\)"),
        ("a\x1b[2J", r"'a\\x1b\[2J': cannot be read"),
        ("\ud800", r"'\\ud800': cannot be read \(invalid characters\)"),
        ("a + \0", "cannot be read"),
        *(("-" * depth + "a", "nested") for depth in (100, 101, 900, 950, 990, 1000, 5000)),
        *(("+".join(["a"] * terms), "nested|longer") for terms in (102, 900, 990, 3000, 6000)),
        ("(" * 5000 + "a" + ")" * 5000, "nested|too many|longer"),
    ],
    ids=[
        "line_break", "escape", "surrogate", "null",
        "minus_100", "minus_101", "minus_900", "minus_950", "minus_990", "minus_1000", "minus_5000",
        "sum_102", "sum_900", "sum_990", "sum_3000", "sum_6000",
        "brackets",
    ],
)  # fmt: skip
def test_damaged_formulas_end_in_one_line(formula: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        WeightsConfig(formula=f"abs({formula})" if formula.startswith("-") else formula)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    assert re.search(reason, message), message


def test_a_constant_beyond_float32_is_no_weight(directory: Path) -> None:
    large = " + ".join(["clip(0 + 0, 1e38)"] * 4)
    with pytest.raises(UserError, match=r"^--weights\.formula: a weight overflows float32; limit it"):
        list(token_weights(str(directory / "good"), {"formula": large}))
