"""The settings of the commands that measure, show or check what is there, and make nothing."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from weighted_mtp.schemas.configs.common import Config, Positive, RowLength, Seed, ShardSets
from weighted_mtp.schemas.configs.weights import WeightsConfig
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting


class EvaluateConfig(Config):
    """Measure the held-out loss of each head of a trained model."""

    model: NameSetting = Field(description="directory of a run, or a Hugging Face model: directory or id")
    input: LocationSetting = Field(description="held-out shard set")
    sequence_length: RowLength | None = Field(
        None, description="tokens in a packed row; default as in training, else the max_length of the shard set"
    )
    batch_size: Positive = Field(8, description="rows per forward pass")
    max_tokens: Positive | None = Field(None, description="stop after this many tokens; default all")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto is bfloat16 on a GPU and float32 on a CPU"
    )


class InspectConfig(Config):
    """Show what a shard set holds."""

    set: LocationSetting = Field(description="shard set")
    column: str | None = Field(None, description="score column whose extremes are shown; default the first contrast")
    samples: Annotated[int, Field(ge=0)] = Field(5, description="how many highest and lowest scoring tokens to show")
    html: Path | None = Field(None, description="also write the report as an HTML page")


class WeightsReportConfig(Config):
    """Show the weights that a scheme gives, before training with them."""

    set: ShardSets = Field(description="shard set; A,B reads score columns of B too, a set of the same rows")
    weights: WeightsConfig = Field(WeightsConfig(), description="token weights")
    live_column: str | None = Field(
        None, description="column that stands for what the model in training would lose, as loss_base"
    )
    samples: Annotated[int, Field(ge=0)] = Field(3, description="how many pieces of text to show with their weights")
    max_tokens: Positive = Field(
        10_000_000, description="look at about this many tokens, in row groups drawn at random from a larger set"
    )
    seed: Seed = Field(0, description="seed of what is drawn, and of random controls as in training")
    html: Path | None = Field(None, description="also write the report as an HTML page")

    @model_validator(mode="after")
    def _check(self) -> "WeightsReportConfig":
        if self.weights.is_live and self.live_column is None:
            raise ValueError(
                "these weights depend on what the model in training loses; name a column that stands for it, "
                "as --live_column loss_base"
            )
        if self.live_column is not None and not self.weights.is_live:
            raise ValueError("--live_column: these weights do not depend on the model in training; leave it out")
        return self


class VerifyConfig(Config):
    """Check every byte of a shard set against its manifest."""

    set: LocationSetting = Field(description="shard set")


class ListConfig(Config):
    """Show the shard sets in directories: columns, sizes, and what was derived from what."""

    directories: list[LocationSetting] = Field(description="where to look, all levels deep")
