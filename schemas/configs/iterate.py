"""The settings of `wmtp iterate`."""

from typing import Any

from pydantic import Field, ValidationError, model_validator

from weighted_mtp.schemas.configs.common import Config, Positive
from weighted_mtp.schemas.configs.score import ScoreConfig
from weighted_mtp.schemas.configs.train import TrainConfig
from weighted_mtp.schemas.storage.locations import LocationSetting, NameSetting
from weighted_mtp.schemas.weights.nodes import Constant


class IterateConfig(Config):
    """Alternate scoring and training: each trained model is the reference of the next round."""

    input: LocationSetting = Field(description="shard set to score and to train on")
    output: LocationSetting = Field(description="directory of the rounds")
    reference: NameSetting = Field(
        description="reference model of the first round: directory, finished run, or Hugging Face id"
    )
    base: NameSetting = Field(description="base model of all rounds: directory, finished run, or Hugging Face id")
    model: NameSetting | None = Field(None, description="model to train in the first round; default is --base")
    rounds: Positive = Field(2, description="number of rounds; rerun with a larger number to add rounds")
    fresh: bool = Field(False, description="start each round from --model instead of the previous round's model")
    score: dict[str, Any] = Field({}, description="settings of 'wmtp score', such as --score.short_context 512")
    train: dict[str, Any] = Field(
        {},
        description="settings of 'wmtp train', such as --train '{weights: {preset: rho1-static}, max_steps: 1000}'",
    )

    def scoring(self, **settings: Any) -> ScoreConfig:
        """Scoring settings of one round: the user's, --base, and `settings`, which take precedence."""
        suffix = f"{self.score.get('suffix', '')}{settings.pop('suffix', '')}"
        return ScoreConfig.model_validate(self.score | {"base": self.base, "suffix": suffix} | settings)

    def training(self, **settings: Any) -> TrainConfig:
        """Training settings of one round: the user's and `settings`, which take precedence."""
        return TrainConfig.model_validate(self.train | settings)

    @model_validator(mode="after")
    def _check(self) -> "IterateConfig":
        for name, given, own in (("score", self.score, SCORE_OWN), ("train", self.train, TRAIN_OWN)):
            if taken := sorted(own & given.keys()):
                raise ValueError(f"--{name}.{taken[0]}: is set by 'wmtp iterate'; leave it out")
        where = {"input": self.input, "output": self.output}
        try:
            name = "score"
            self.scoring(**where, reference=self.reference)
            name = "train"
            training = self.training(**where, model=self.base)
        except ValidationError as error:
            finding = error.errors()[0]
            key = ".".join([name, *(part for part in finding["loc"] if isinstance(part, str))])
            unknown = finding["type"] == "extra_forbidden"
            message = finding["msg"].removeprefix("Value error, ").replace("Input should", "should")
            reason = "no such setting" if unknown else message
            raise ValueError(f"--{key}: {reason}; see 'wmtp {name} --help'") from error
        if isinstance(training.weights.node, Constant):
            raise ValueError("--train.weights.preset: choose a scheme that uses the scores")
        return self


SCORE_OWN = {"input", "output", "reference", "base", "dry_run"}
TRAIN_OWN = {"input", "output", "model", "dry_run"}
"""Settings of scoring and training that `wmtp iterate` sets itself."""
