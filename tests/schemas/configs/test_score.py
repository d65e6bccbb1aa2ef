"""The settings of `wmtp score`: contradictions between them."""

from typing import Any

import pytest

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError

SETTINGS = {"input": "tokens", "output": "scored"}
REFERENCE = {"reference": "m"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "--reference missing; give a scoring model there or in --conditions"),
        *[
            ({"conditions": {"a": {"model": "m"}}, name: value}, f"--{name} needs --reference")
            for name, value in {"base": "b", "entropy": True, "gradient": True, "short_context": 8}.items()
        ],
        ({"conditions": {"base": {"model": "m"}}}, "'base' has its own flags"),
        ({"conditions": {"a-b": {"model": "m"}}}, "'a-b' is not a valid column name"),
        (REFERENCE | {"contrasts": {"corpus": "a - b"}}, "'corpus' is reserved by wmtp"),
        (REFERENCE | {"contrasts": {"mine": "a - b - c"}}, "mine should be the difference of two columns"),
        (REFERENCE | {"contrasts": {"entropy_base": "a - b"}}, "--contrasts: entropy_base is the name of another"),
        (
            {"conditions": {"bad": {"model": "m"}}, "contrasts": {"loss_bad": "a - b"}},
            "--contrasts: loss_bad is the name of another column",
        ),
        (REFERENCE | {"workers": 2, "min_workers": 3}, "--min_workers must not be larger than --workers"),
        (REFERENCE | {"gpus_per_worker": 1.5}, "--gpus_per_worker must be a whole number or a share of one GPU"),
        (REFERENCE | {"short_stride": 4}, "--short_stride needs --short_context"),
        (REFERENCE | {"short_context": 4, "short_stride": 4}, "--short_stride must be smaller than --short_context"),
        (REFERENCE | {"suffix": "-2"}, "should match pattern"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ScoreConfig(**SETTINGS | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"contrasts": {"mine": "  loss_a-loss_b "}},
        {"conditions": {"a": {"model": "m", "prompt": "x", "entropy": True}}},
        REFERENCE | {"workers": 0, "min_workers": 3},
        REFERENCE | {"workers": 2, "min_workers": 2},
        REFERENCE | {"gpus_per_worker": 0.25},
        REFERENCE | {"gpus_per_worker": 2.0},
        REFERENCE | {"short_context": 4, "short_stride": 3},
    ],
)
def test_settings_that_are_just_allowed(settings: dict[str, Any]) -> None:
    ScoreConfig(**SETTINGS | settings)
