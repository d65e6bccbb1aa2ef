"""The settings of `wmtp iterate`: the two parts of a round."""

from typing import Any

import pytest

from weighted_mtp.schemas.configs import IterateConfig
from weighted_mtp.schemas.errors import UserError

SETTINGS: dict[str, Any] = {"input": "tokens", "output": "rounds", "reference": "r", "base": "b"}
WEIGHTS = {"weights": {"preset": "rho1-static"}}


def test_settings_of_a_round_take_precedence_and_suffixes_are_joined() -> None:
    config = IterateConfig(**SETTINGS, score={"suffix": "_a", "workers": 2}, train=WEIGHTS | {"max_steps": 7})
    score = config.scoring(input="x", output="y", reference="z", suffix="_2", workers=3)
    assert (score.reference, score.base, score.suffix, score.workers) == ("z", "b", "_a_2", 3)
    assert config.scoring(input="x", output="y", reference="z").suffix == "_a"
    train = config.training(input="x", output="y", model="z", max_steps=9)
    assert (train.model, train.max_steps, train.weights.preset) == ("z", 9, "rho1-static")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"score": {"reference": "x"}}, "--score.reference: is set by 'wmtp iterate'; leave it out"),
        ({"train": {"output": "x", "model": "y"}}, "--train.model: is set by 'wmtp iterate'; leave it out"),
        ({"score": {"short_contex": 5}}, "--score.short_contex: no such setting; see 'wmtp score --help'"),
        ({"score": {"short_stride": 5}}, "--score: --short_stride needs --short_context; see 'wmtp score --help'"),
        ({"train": WEIGHTS | {"max_steps": 0}}, "--train.max_steps: should be greater than 0; see 'wmtp train --help'"),
        ({"train": WEIGHTS | {"ray_address": "x"}}, "--train: --ray_address needs --ray_workers"),
        ({}, "--train.weights.preset: choose a scheme that uses the scores"),
        ({"train": WEIGHTS, "rounds": 0}, "greater than 0"),
    ],
)
def test_settings_that_are_refused_name_their_part(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        IterateConfig(**SETTINGS | settings)
