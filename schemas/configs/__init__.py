"""Settings of all commands, as frozen pydantic models.

Field names are command line flags and keys of a YAML file. Descriptions are help texts.
"""

from weighted_mtp.schemas.configs.common import Config, ShardSets, exact, split_paths
from weighted_mtp.schemas.configs.demo import DemoConfig
from weighted_mtp.schemas.configs.heads import DirectDecodingConfig, HeadsConfig
from weighted_mtp.schemas.configs.import_scores import ImportConfig
from weighted_mtp.schemas.configs.iterate import IterateConfig
from weighted_mtp.schemas.configs.prepare import PrepareConfig
from weighted_mtp.schemas.configs.reports import (
    EvaluateConfig,
    InspectConfig,
    ListConfig,
    VerifyConfig,
    WeightsReportConfig,
)
from weighted_mtp.schemas.configs.score import ConditionConfig, ScoreConfig
from weighted_mtp.schemas.configs.train import LoRAConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from weighted_mtp.schemas.configs.upgrade import UpgradeConfig
from weighted_mtp.schemas.configs.weights import WeightsConfig

__all__ = [
    "ConditionConfig",
    "Config",
    "DemoConfig",
    "DirectDecodingConfig",
    "EvaluateConfig",
    "HeadsConfig",
    "ImportConfig",
    "InspectConfig",
    "IterateConfig",
    "ListConfig",
    "LoRAConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "ScoreConfig",
    "ShardSets",
    "TrainConfig",
    "UpgradeConfig",
    "VerifyConfig",
    "WeightsConfig",
    "WeightsReportConfig",
    "exact",
    "split_paths",
]
