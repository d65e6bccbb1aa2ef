"""The settings of every command, as frozen pydantic models.

Field names are the command line's flags and the keys of a YAML file; descriptions are its help.
"""

from schemas.configs.common import Config, ShardSets, exact, split_paths
from schemas.configs.demo import DemoConfig
from schemas.configs.heads import DirectDecodingConfig, HeadsConfig
from schemas.configs.iterate import IterateConfig
from schemas.configs.prepare import PrepareConfig
from schemas.configs.reports import EvaluateConfig, InspectConfig, ListConfig, VerifyConfig, WeightsReportConfig
from schemas.configs.score import ConditionConfig, ScoreConfig
from schemas.configs.train import LoRAConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from schemas.configs.weights import WeightsConfig

__all__ = [
    "ConditionConfig",
    "Config",
    "DemoConfig",
    "DirectDecodingConfig",
    "EvaluateConfig",
    "HeadsConfig",
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
    "VerifyConfig",
    "WeightsConfig",
    "WeightsReportConfig",
    "exact",
    "split_paths",
]
