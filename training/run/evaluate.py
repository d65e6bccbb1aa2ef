"""Evaluation of a saved model, from settings to the loss of every prediction."""

from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.locations import locate
from weighted_mtp.training.evaluation import HeadLoss, evaluate_model
from weighted_mtp.training.model.mtp_model import load_model
from weighted_mtp.training.run.compatibility import check_model, check_tokenizer, run_record
from weighted_mtp.training.run.train import make_accelerator
from weighted_mtp.training.sharding import sharding_requested


def evaluate(config: EvaluateConfig, progress: MakeBar = hidden_bar) -> list[HeadLoss]:
    """Held-out loss and accuracy of every prediction of a model.

    Args:
        config: the settings of `wmtp evaluate`.
        progress: makes the bar of tokens.

    Raises:
        UserError: the model or the set cannot be loaded, or they do not fit each other.
    """
    shards = ShardSet.open(config.input)
    check_tokenizer(config.model, shards, trust_remote_code=config.trust_remote_code)
    model = load_model(config.model, trust_remote_code=config.trust_remote_code)
    record = run_record(locate(config.model))
    trained = record["config"]["sequence_length"] if record else None
    sequence_length = config.sequence_length or trained or shards.manifest.corpus.max_length
    check_model(model, config.model, shards, sequence_length)
    with sharding_requested(False):  # every process holds the whole model, even under `accelerate launch --use_fsdp`
        accelerator = make_accelerator(config.dtype)
        return evaluate_model(
            accelerator,
            accelerator.prepare(model),
            ZippedSets((shards,)),
            sequence_length=sequence_length,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            progress=progress,
        )
