"""Weighted multi-token prediction: score tokens offline, then train with weights from the scores.

`docs/python.md` shows the names below at work. They are loaded on first use, because every use of vLLM in the
environment imports this package. The subpackages are symbolic links to the top-level folders of the same names.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weighted_mtp.schemas.configs import (
        EvaluateConfig,
        HeadsConfig,
        PrepareConfig,
        ScoreConfig,
        TrainConfig,
        WeightsConfig,
    )
    from weighted_mtp.schemas.errors import UserError
    from weighted_mtp.schemas.shard_set.shard_set import ShardSet
    from weighted_mtp.scoring.corpus.prepare import prepare
    from weighted_mtp.scoring.imports.run import add_columns
    from weighted_mtp.scoring.job.run import score
    from weighted_mtp.training.data.collate import collate_rows
    from weighted_mtp.training.data.packed_rows import packed_rows
    from weighted_mtp.training.loss.multi_head import (
        HeadGroup,
        HeadTargets,
        multi_head_cross_entropy,
        weighted_linear_cross_entropy,
    )
    from weighted_mtp.training.loss.shifted_targets import select_targets
    from weighted_mtp.training.model.mtp_model import load_model
    from weighted_mtp.training.model.weighted_loss import add_weighted_loss, weighted_loss
    from weighted_mtp.training.run.evaluate import evaluate
    from weighted_mtp.training.run.load import load_run
    from weighted_mtp.training.run.train import train
    from weighted_mtp.training.weighting.token_weights import token_weights

__all__ = [
    "EvaluateConfig",
    "HeadGroup",
    "HeadTargets",
    "HeadsConfig",
    "PrepareConfig",
    "ScoreConfig",
    "ShardSet",
    "TrainConfig",
    "UserError",
    "WeightsConfig",
    "add_columns",
    "add_weighted_loss",
    "collate_rows",
    "evaluate",
    "load_model",
    "load_run",
    "multi_head_cross_entropy",
    "packed_rows",
    "prepare",
    "score",
    "select_targets",
    "token_weights",
    "train",
    "weighted_linear_cross_entropy",
    "weighted_loss",
]

if not TYPE_CHECKING:
    _MODULES = {
        "EvaluateConfig": "schemas.configs",
        "HeadGroup": "training.loss.multi_head",
        "HeadTargets": "training.loss.multi_head",
        "HeadsConfig": "schemas.configs",
        "PrepareConfig": "schemas.configs",
        "ScoreConfig": "schemas.configs",
        "ShardSet": "schemas.shard_set.shard_set",
        "TrainConfig": "schemas.configs",
        "UserError": "schemas.errors",
        "WeightsConfig": "schemas.configs",
        "add_columns": "scoring.imports.run",
        "add_weighted_loss": "training.model.weighted_loss",
        "collate_rows": "training.data.collate",
        "evaluate": "training.run.evaluate",
        "load_model": "training.model.mtp_model",
        "load_run": "training.run.load",
        "multi_head_cross_entropy": "training.loss.multi_head",
        "packed_rows": "training.data.packed_rows",
        "prepare": "scoring.corpus.prepare",
        "score": "scoring.job.run",
        "select_targets": "training.loss.shifted_targets",
        "token_weights": "training.weighting.token_weights",
        "train": "training.run.train",
        "weighted_linear_cross_entropy": "training.loss.multi_head",
        "weighted_loss": "training.model.weighted_loss",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'weighted_mtp' has no attribute '{name}'")
        value = getattr(import_module(f"weighted_mtp.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
