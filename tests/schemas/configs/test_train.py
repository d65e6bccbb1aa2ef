"""The settings of `wmtp train`: contradictions between them."""

from typing import Any

import pytest

from weighted_mtp.schemas.configs import ObjectiveConfig, TrainConfig, WeightsConfig
from weighted_mtp.schemas.errors import UserError

SETTINGS = {"input": "set", "model": "m", "output": "run"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": -0.25}, "need --objective.kind diversity_or_precision"),
        ({"lambda_tail": -0.1}, "need --objective.kind diversity_or_precision"),
        ({"top_k": 5}, "need --objective.kind diversity_or_precision"),
        ({"kind": "diversity_or_precision", "top_k": 5}, "--objective.top_k needs"),
        ({"kind": "diversity_or_precision", "beta": -1.5}, "greater than or equal to -1"),
    ],
)
def test_settings_of_the_objective_that_do_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ObjectiveConfig(**settings)


def test_the_sum_of_live_weights_must_be_known() -> None:
    settings = {"input": "set", "model": "m", "output": "run", "normalization": "weight_sum"}
    with pytest.raises(ValueError, match="--normalization weight_sum needs the sum of the weights in advance"):
        TrainConfig(**settings, weights=WeightsConfig(preset="longce", live=True))
    assert TrainConfig(**settings, weights=WeightsConfig(preset="rho1")).weights.is_live


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sequence_length": 4}, "--sequence_length must be larger than the largest of --heads.offsets"),
        ({"trainable": "heads", "heads": {"offsets": (1,)}}, "--trainable heads needs extra heads"),
        (
            {"trainable": "heads", "heads": {"offsets": (1, 2), "coefficients": (1, 0)}},
            "--trainable heads needs a value above 0",
        ),
        ({"eval_tokens": 1}, "greater than or equal to 2"),
        ({"lora": {"rank": 8}}, "--lora needs --trainable lora"),
        ({"ray_address": "host:1"}, "--ray_address needs --ray_workers"),
        ({"mix": {"a": 0.5, "b": 0.5}}, "shares should sum to less than 1"),
        ({"mix": {"a,": 0.5}}, "a path on both sides of every comma"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "less than 1"),
        ({"optimizer": {"rate": 1.0}}, "Extra inputs are not permitted"),
        ({"trackers": ("excel",)}, "Input should be 'aim'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TrainConfig(**SETTINGS | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_length": 5},
        {"trainable": "heads", "heads": {"offsets": (1, 2), "coefficients": (0, 1)}},
        {"trainable": "lora", "lora": {"rank": 8}},
        {"ray_address": "host:1", "ray_workers": 2},
        {"mix": {"a": 0.7, "b": 0.1, "c": 0.1}},
    ],
)
def test_settings_that_are_just_allowed(settings: dict[str, Any]) -> None:
    TrainConfig(**SETTINGS | settings)


def test_shares_are_summed_as_they_are_written() -> None:
    """In binary, 0.7 + 0.1 + 0.1 + 0.1 is less than 1."""
    mix = {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1}
    assert sum(mix.values()) < 1
    with pytest.raises(UserError, match="shares should sum to less than 1"):
        TrainConfig(**SETTINGS, mix=mix)


def test_several_sets_are_zipped() -> None:
    assert [str(path) for path in TrainConfig(**SETTINGS | {"input": "a, b"}).input] == ["a", "b"]
