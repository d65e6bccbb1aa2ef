"""`wmtp evaluate`: held-out loss of every head of a trained model."""

from weighted_mtp.pipelines.reports.evaluation_table import print_losses
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.locations import locate
from weighted_mtp.training.evaluation import HeadLoss, evaluate_model
from weighted_mtp.training.model.mtp_model import load_model
from weighted_mtp.training.run.compatibility import check_model, check_tokenizer, run_record
from weighted_mtp.training.run.train import make_accelerator
from weighted_mtp.training.sharding import sharding_requested


def run(config: EvaluateConfig) -> list[HeadLoss]:
    """Evaluate, print a table, and return the loss of every head."""
    shards = ShardSet.open(config.input)
    check_tokenizer(config.model, shards)
    model = load_model(config.model)
    record = run_record(locate(config.model))
    trained = record["config"]["sequence_length"] if record else None
    sequence_length = config.sequence_length or trained or shards.manifest.corpus.max_length
    check_model(model, config.model, shards, sequence_length)
    with sharding_requested(False):  # every process holds the whole model, even under `accelerate launch --use_fsdp`
        accelerator = make_accelerator(config.dtype)
        losses = evaluate_model(
            accelerator,
            accelerator.prepare(model),
            ZippedSets((shards,)),
            sequence_length=sequence_length,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
        )
    print_losses(config, losses)
    return losses
