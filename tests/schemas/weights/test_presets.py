import pytest

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.weights.presets import PRESETS, SETTINGS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_formula(preset: str) -> None:
    config = WeightsConfig(preset=preset, group="prompt" if preset == "advantage" else None)
    again = WeightsConfig(formula=config.text)
    assert again.node == config.node
    assert again.is_live == (preset == "rho1")


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.live_column])
def test_live_variants_contrast_with_the_model_in_training(preset: str) -> None:
    config = WeightsConfig(preset=preset, live=True)
    assert config.is_live
    assert "(loss_short - live)" in config.text


def test_every_setting_of_a_preset_is_a_setting_of_the_configuration() -> None:
    assert set(SETTINGS) <= WeightsConfig.model_fields.keys()
    assert set(SETTINGS) == {"column", "fraction", "lam", "gamma", "tau", "s", "silent", "group"}
