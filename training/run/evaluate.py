"""Evaluation of a saved model, from settings to the loss of every prediction."""

from dataclasses import dataclass
from typing import Literal

from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import locate
from weighted_mtp.training.data.loader import check_targets
from weighted_mtp.training.evaluation import HeadLoss, evaluate_model
from weighted_mtp.training.model.mtp_model import load_model
from weighted_mtp.training.run.compatibility import check_model, check_tokenizer, run_record
from weighted_mtp.training.run.train import make_accelerator
from weighted_mtp.training.sharding import sharding_requested


@dataclass(frozen=True)
class Evaluation:
    """Results of a model on a held-out set.

    Attributes:
        losses: one entry for each of `HeadsConfig.predictions`.
        sequence_length: tokens per packed row; longer sequences were cut.
        length_source: where that length came from: the setting, the training run, or the `max_length` of the set.
    """

    losses: list[HeadLoss]
    sequence_length: int
    length_source: Literal["setting", "run", "set"]


def evaluate(config: EvaluateConfig, progress: MakeBar = hidden_bar) -> Evaluation:
    """Held-out loss and accuracy of every prediction of a model.

    Args:
        config: the settings of `wmtp evaluate`.
        progress: makes the bar of tokens.

    Raises:
        UserError: the model or the set cannot be loaded, or they do not fit each other.
    """
    shards = ShardSet.open(config.input)
    check_targets(shards)
    check_tokenizer(config.model, shards, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, trust_remote_code=config.trust_remote_code)
    length, source = choose_length(config, shards)
    check_model(model, config.model, shards, length)
    with sharding_requested(False):  # every process holds the whole model, even under `accelerate launch --use_fsdp`
        accelerator = make_accelerator(config.dtype)
        losses = evaluate_model(
            accelerator,
            accelerator.prepare(model),
            shards,
            sequence_length=length,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            progress=progress,
        )
    return Evaluation(losses, length, source)


def choose_length(config: EvaluateConfig, shards: ShardSet) -> tuple[int, Literal["setting", "run", "set"]]:
    """Tokens per packed row, and where that number came from.

    Raises:
        UserError: the model is a run that is not finished, or its record is damaged.
    """
    if config.sequence_length is not None:
        return config.sequence_length, "setting"
    if (record := run_record(locate(config.model))) is not None:
        return record["config"]["sequence_length"], "run"
    return shards.manifest.corpus.max_length, "set"
