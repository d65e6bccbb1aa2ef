"""Settings of the commands that write no shard sets or models."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from weighted_mtp.schemas.configs.common import (
    Config,
    EvaluatedTokens,
    Mix,
    Positive,
    RowLength,
    Seed,
    ShardSets,
    check_mix,
)
from weighted_mtp.schemas.configs.weights import WeightsConfig
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting, PathSetting

Samples = Annotated[int, Field(ge=0, le=1000)]


class EvaluateConfig(Config):
    """Measure the held-out loss of each head of a trained model."""

    model: NameSetting = Field(description="directory of a run, or a Hugging Face model: directory or id")
    input: LocationSetting = Field(description="held-out shard set")
    trust_remote_code: bool = Field(False, description="run Python code in the directory of --model")
    sequence_length: RowLength | None = Field(
        None,
        description="tokens per packed row, in which longer sequences are cut; default as in training, else the "
        "max_length of the shard set",
    )
    batch_size: Positive = Field(8, description="rows per forward pass; does not change what is evaluated")
    max_tokens: EvaluatedTokens | None = Field(
        None, description="number of tokens to evaluate, from the start of the set; default all"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is bfloat16 on a GPU and float32 on a CPU"
    )


class InspectConfig(Config):
    """Show the contents of a shard set."""

    set: LocationSetting = Field(description="shard set")
    column: str | None = Field(None, description="score column for extreme tokens; default is the first contrast")
    samples: Samples = Field(5, description="number of highest and lowest scoring tokens to show")
    html: PathSetting | None = Field(None, description="also write the report as an HTML page")


class WeightsReportConfig(Config):
    """Show the token weights of a scheme before training with them."""

    set: ShardSets = Field(description="shard set; A,B also reads the score columns of B, a set with the same rows")
    mix: Mix = Field(
        {},
        description="more shard sets and their shares of the rows, as in training; adds a table with what each keeps",
    )
    weights: WeightsConfig = Field(WeightsConfig(), description="token weights")
    live_column: str | None = Field(
        None, description="column to use instead of the loss of the model in training, such as loss_base"
    )
    samples: Samples = Field(3, description="number of text excerpts to show with their weights")
    max_tokens: Positive = Field(
        10_000_000, description="read about this many tokens; row groups of larger sets are sampled at random"
    )
    seed: Seed = Field(0, description="random seed of the samples, and of random controls as in training")
    html: PathSetting | None = Field(None, description="also write the report as an HTML page")

    _check_mix = field_validator("mix")(check_mix)

    @model_validator(mode="after")
    def _check(self) -> "WeightsReportConfig":
        if self.weights.is_live and self.live_column is None:
            raise ValueError(
                "these weights depend on the loss of the model in training; name a column to use instead, "
                "such as --live_column loss_base"
            )
        if self.live_column is not None and not self.weights.is_live:
            raise ValueError("--live_column: these weights do not depend on the model in training; leave it out")
        return self


class VerifyConfig(Config):
    """Check every byte of a shard set against its manifest."""

    set: LocationSetting = Field(description="shard set")


class ListConfig(Config):
    """List the shard sets and training runs in directories, finished or not."""

    directories: list[LocationSetting] = Field(description="directories to search, at all depths")
