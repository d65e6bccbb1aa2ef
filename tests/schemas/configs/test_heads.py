"""The settings `--heads.*`: contradictions between them, and what follows from them."""

from typing import Any

import pytest

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dmtd": {"cycle": 4}}, "needs --heads.dmtd.decoding_layers"),
        ({"dmtd": {"decoding_layers": 4}}, "need --heads.dmtd.cycle above 1"),
        ({"dmtd": {"encoding_layers": 1}}, "need --heads.dmtd.cycle above 1"),
        ({"dmtd": {"cycle": 2, "decoding_layers": 1}, "offsets": (1, 2)}, r"needs --heads.offsets \[1\]"),
    ],
)
def test_settings_of_direct_decoding_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HeadsConfig(**{"offsets": (1,)} | settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_window": 4}, "--heads.top_window needs --heads.top_coefficient"),
        ({"top_coefficient": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_of_token_order_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HeadsConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"offsets": ()}, r"--heads.offsets must start with 1 and increase"),
        ({"offsets": (2, 3)}, "--heads.offsets must start with 1 and increase"),
        ({"offsets": (1, 3, 2)}, "--heads.offsets must start with 1 and increase"),
        ({"offsets": (1, 2, 2)}, "--heads.offsets must start with 1 and increase"),
        ({"coefficients": (1.0, 0.5)}, "--heads.coefficients needs 4 entries, one for each offset"),
        ({"offsets": (1, 2), "coefficients": (0.0, 0.0)}, "--heads.coefficients must not all be 0"),
        ({"kind": "sequential", "block": "decoder"}, "--heads.block is for --heads.kind parallel"),
    ],
)
def test_heads_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HeadsConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1, 1, 1, 1)),
        ({"offsets": (1,)}, (1,)),
        ({"offsets": (1, 2, 4), "kind": "sequential"}, (1, 0.15, 0.15)),
        ({"offsets": (1,), "kind": "sequential"}, (1,)),
        ({"offsets": (1, 2), "coefficients": (1, 0.5)}, (1, 0.5)),
        ({"offsets": (1, 2), "top_coefficient": 0.25}, (1, 1, 0.25)),
    ],
)
def test_factors_of_the_losses(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    """Sequential heads share 0.3."""
    assert HeadsConfig(**settings).loss_coefficients == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"offsets": (1, 3)}, ("1", "3")),
        ({"offsets": (1, 2), "top_coefficient": 1}, ("1", "2", "top")),
        (
            {"offsets": (1,), "top_coefficient": 1, "dmtd": {"cycle": 2, "decoding_layers": 1}},
            ("1", "top", "phase_0", "phase_1"),
        ),
    ],
)
def test_names_of_the_predictions(settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert HeadsConfig(**settings).predictions == expected
