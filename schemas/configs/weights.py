"""The settings under `weights` of `wmtp train` and `wmtp weights`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from weighted_mtp.schemas.configs.common import Config, PositiveFraction
from weighted_mtp.schemas.weights.language import FUNCTION_NAMES, parse_formula, rename
from weighted_mtp.schemas.weights.nodes import Constant, FormulaError, Node, is_live, is_signed
from weighted_mtp.schemas.weights.presets import PRESETS, SETTINGS

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]  # choices of the command line


class WeightsConfig(Config):
    """The map from score columns to one weight per target token: a preset, or a formula in the weight language."""

    preset: PresetName = Field(
        "uniform",
        description="weighting scheme; docs/weights.md has the formula of each. sparse, ppmi and npmi give weight 0 to "
        "documents no longer than the short context, unless --weights.silent is 1",
    )
    formula: str | None = Field(
        None,
        description="formula in the weight language instead of a preset, such as 'normalise(top(excess_loss, 0.6))'; "
        f"it has + - * /, comparisons and the functions {FUNCTION_NAMES}; docs/weights.md describes them",
    )
    column: str | None = Field(
        None, description="score of the preset: a column, or a formula of columns; each preset has its default"
    )
    live: bool = Field(
        False, description="contrast loss_short (or --weights.column) with the loss of the model in training"
    )
    fraction: PositiveFraction | None = Field(None, description="share of tokens to keep; default 0.6")
    lam: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="dense: share of plain cross-entropy; default 0.75"
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(None, description="longce: largest weight; default 5")
    tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="soft-threshold: score at which the weight reaches its maximum; default 1"
    )
    s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="ppmi, npmi: ratio of probabilities above which a token has weight; default 1"
    )
    silent: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="dense, sparse, ppmi, npmi: weight in sequences without signal, such as documents no longer than "
        "the short context; default 0, 1 in the authors' code",
    )
    group: str | None = Field(None, description="advantage: label column; rewards are compared within a label")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the steps over which weights move from 1 to the scheme's"
    )
    control: Literal["none", "shuffled", "random"] = Field(
        "none",
        description="control experiment: weights shuffled within each sequence, or LogNormal with the same moments",
    )

    @model_validator(mode="after")
    def _check(self) -> "WeightsConfig":
        preset = PRESETS[self.preset] if self.formula is None else None
        own = f"--weights.preset {self.preset}" if self.formula is None else "--weights.formula"
        if self.formula is not None and self.preset != "uniform":
            raise ValueError("--weights.preset and --weights.formula exclude each other")
        used = preset.settings if preset else []
        for name in SETTINGS:
            if getattr(self, name) is not None and name not in used:
                raise ValueError(f"--weights.{name} has no effect with {own}; leave it out")
        if self.live and (preset is None or preset.live_column is None):
            raise ValueError(f"--weights.live does not apply to {own}")
        if "group" in used and not (self.group or "").isidentifier():
            raise ValueError(f"{own} needs --weights.group, the name of a label column")
        for name, text in (("column", self.column), ("formula", self.formula)):
            try:
                parse_formula(text or "1")
            except FormulaError as error:
                raise ValueError(f"--weights.{name}: {error}") from error
        node = self.node
        if is_signed(node) and self.control == "random":
            raise ValueError("--weights.control random cannot draw negative weights; use shuffled")
        if isinstance(node, Constant) and self.control != "none":
            raise ValueError(f"--weights.control needs weights other than those of {own}")
        return self

    @property
    def text(self) -> str:
        """The formula with all settings substituted."""
        if self.formula is not None:
            return self.formula.strip()
        preset = PRESETS[self.preset]
        column = self.column or (preset.live_column if self.live else preset.column) or ""
        score = column if column.isidentifier() else f"({column})"
        settings: dict[str, Any] = preset.defaults | {
            name: value for name in preset.settings if (value := getattr(self, name)) is not None
        }
        return preset.formula.format(score=f"({score} - live)" if self.live else score, **settings)

    @property
    def node(self) -> Node:
        """The parsed formula."""
        return parse_formula(self.text)

    @property
    def is_live(self) -> bool:
        """Whether weights depend on the model in training."""
        return is_live(self.node)

    def with_columns(self, names: Mapping[str, str]) -> "WeightsConfig":
        """The same scheme as a formula, with some columns renamed."""
        formula = rename(self.text, names)
        return WeightsConfig(formula=formula, warmup_ratio=self.warmup_ratio, control=self.control)
