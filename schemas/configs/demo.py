"""The settings of `wmtp demo`."""

from pathlib import Path

from pydantic import Field

from weighted_mtp.schemas.configs.common import Config, EngineChoice, Positive, Seed
from weighted_mtp.schemas.storage.locations import PathSetting


class DemoConfig(Config):
    """Run the whole pipeline on text included in every Python installation."""

    output: PathSetting = Field(Path("runs/demo"), description="directory for all files of the demo")
    engine: EngineChoice = Field("auto", description="engine of the scoring step")
    base_steps: Positive = Field(400, description="training steps of the base model")
    reference_steps: Positive = Field(100, description="training steps of the reference model, from the base model")
    student_steps: Positive = Field(200, description="training steps of each student")
    seed: Seed = Field(0, description="random seed")
