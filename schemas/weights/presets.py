"""Published weighting schemes as formulas of the weight language (`schemas.weights.language`)."""

import string
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A weighting scheme.

    Attributes:
        formula: in the weight language, with settings of `schemas.configs.WeightsConfig` in braces. `{score}` is the
            setting `column`; with the setting `live` it is that column minus the live loss.
        source: publication of the scheme.
        column: default of the setting `column`.
        live_column: default of `column` with `live`; None if the preset has no live variant.
        defaults: defaults of the other settings; settings without one are required.
    """

    formula: str
    source: str
    column: str | None = None
    live_column: str | None = None
    defaults: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """Names of the settings that the formula uses."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.formula) if name]
        return ["column" if name == "score" else name for name in dict.fromkeys(names)]


PRESETS = {
    "uniform": Preset("1", "plain cross-entropy"),
    "rho1": Preset(
        "normalise(top(live - {score}, {fraction}, by=batch), by=batch)",
        "Rho-1, arXiv 2404.07965, equation 4",
        column="loss_reference",
        defaults={"fraction": 0.6},
    ),
    "rho1-static": Preset(
        "normalise(top({score}, {fraction}, by=corpus), by=corpus)",
        "Token Cleaning, arXiv 2502.01968",
        column="excess_loss",
        defaults={"fraction": 0.6},
    ),
    "self-reference-loss": Preset(
        "normalise(top(-{score}, {fraction}, by=corpus), by=corpus)",
        "Rho-1, arXiv 2404.07965, appendix H",
        column="loss_reference",
        defaults={"fraction": 0.6},
    ),
    "self-reference-entropy": Preset(
        "normalise(top(-{score}, {fraction}, by=corpus), by=corpus)",
        "Rho-1, arXiv 2404.07965, appendix H",
        column="entropy_reference",
        defaults={"fraction": 0.6},
    ),
    "self-reference": Preset(
        "normalise(top(-loss_reference, {fraction}, by=corpus) * top(-entropy_reference, {fraction}, by=corpus))",
        "Rho-1, arXiv 2404.07965, appendix H",
        defaults={"fraction": 0.6},
    ),
    "dense": Preset(
        "interpolate(normalise(abs({score}), silent={silent}, by=sequence), {lam})",
        "lambda of arXiv 2503.09202",
        column="long_short",
        live_column="loss_short",
        defaults={"lam": 0.75, "silent": 0.0},
    ),
    "sparse": Preset(
        "normalise(top(abs({score}), {fraction}, by=sequence), silent={silent}, by=sequence)",
        "kappa of arXiv 2503.09202",
        column="long_short",
        live_column="loss_short",
        defaults={"fraction": 0.6, "silent": 0.0},
    ),
    "longce": Preset(
        "clip(exp({score}), high={gamma})",
        "LongCE, arXiv 2410.23771",
        column="long_short",
        live_column="loss_short",
        defaults={"gamma": 5.0},
    ),
    "ppmi": Preset(
        "normalise(relu({score} - log({s})), silent={silent}, by=sequence)",
        "PPMI of arXiv 2503.09202",
        column="long_short",
        live_column="loss_short",
        defaults={"s": 1.0, "silent": 0.0},
    ),
    "npmi": Preset(
        "normalise(relu(-{score} - log({s})), silent={silent}, by=sequence)",
        "NPMI of arXiv 2503.09202",
        column="long_short",
        live_column="loss_short",
        defaults={"s": 1.0, "silent": 0.0},
    ),
    "soft-threshold": Preset(
        "normalise(clip({score} / {tau}, 0, 1), by=corpus)",
        "min(score / tau, 1) where the score is positive",
        column="excess_loss",
        defaults={"tau": 1.0},
    ),
    "reward": Preset("signed({score})", "the reward of the document, for each of its tokens", column="reward"),
    "advantage": Preset(
        "signed(standardise({score}, by={group}))",
        "GRPO's advantage, arXiv 2402.03300, of stored rewards",
        column="reward",
    ),
}
SETTINGS = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset.settings))
"""Names of the settings used by any preset."""
