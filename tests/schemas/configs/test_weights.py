"""The settings `--weights.*`: what they resolve to, and contradictions between them."""

import pytest

from weighted_mtp.schemas.configs import WeightsConfig


def test_settings_become_part_of_the_formula() -> None:
    config = WeightsConfig(preset="sparse", column="loss_a - loss_b", fraction=0.25, silent=1.0)
    assert config.text == "normalise(top(abs((loss_a - loss_b)), 0.25, by=sequence), silent=1.0, by=sequence)"


def test_columns_of_a_scheme_are_renamed() -> None:
    weights = WeightsConfig(preset="dense", warmup_ratio=0.1, control="random").with_columns({"long_short": "ls"})
    assert weights.text == "interpolate(normalise(abs(ls), silent=0.0, by=sequence), 0.75)"
    assert (weights.warmup_ratio, weights.control) == (0.1, "random")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "rho1-static", "tau": 2.0}, "--weights.tau has no effect with --weights.preset rho1-static"),
        ({"preset": "uniform", "column": "x"}, "--weights.column has no effect with --weights.preset uniform"),
        ({"formula": "x", "fraction": 0.5}, "--weights.fraction has no effect with --weights.formula"),
        ({"formula": "x", "preset": "dense"}, "exclude each other"),
        ({"formula": "top(x)"}, r"--weights.formula: 'top\(x\)': top\(\) needs a number"),
        ({"preset": "dense", "column": "a b"}, "--weights.column: 'a b': cannot be read"),
        (
            {"preset": "soft-threshold", "live": True},
            "--weights.live does not apply to --weights.preset soft-threshold",
        ),
        ({"preset": "advantage"}, "needs --weights.group"),
        ({"control": "shuffled"}, "--weights.control needs weights other"),
        ({"formula": "2", "control": "random"}, "--weights.control needs weights other"),
        ({"preset": "reward", "control": "random"}, "--weights.control random cannot draw negative weights"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightsConfig(**settings)
