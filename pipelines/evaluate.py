"""`wmtp evaluate`: held-out loss of every head of a trained model."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.configs import EvaluateConfig
from schemas.errors import UserError
from schemas.files import read_json
from schemas.locations import Location, locate
from schemas.shard_set import ShardSet
from schemas.zipped import ZippedSets
from training.checks import check_model, check_tokenizer
from training.evaluation import HeadLoss, evaluate_model
from training.model import load_model
from training.sharding import sharding_requested
from training.trainer import make_accelerator


def run(config: EvaluateConfig) -> list[HeadLoss]:
    """Evaluate, print a table, and return the loss of every head."""
    shards = ShardSet.open(config.input)
    place = locate(config.model)
    record = run_record(place)
    if record is None:
        check_tokenizer(config.model, shards)
    elif record["inputs"]["tokenizer"] != shards.manifest.tokenizer.fingerprint:
        raise UserError(f"--input {config.input}: has another tokenizer than {config.model} was trained with")
    model = load_model(config.model)
    trained = record["config"]["sequence_length"] if record else None
    sequence_length = config.sequence_length or trained or shards.manifest.corpus.max_length
    check_model(model, config.model, shards, sequence_length)
    with sharding_requested(False):  # the model is whole in every process, whatever accelerate launch was given
        accelerator = make_accelerator(config.dtype)
        losses = evaluate_model(
            accelerator,
            accelerator.prepare(model),
            ZippedSets((shards,)),
            sequence_length=sequence_length,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
        )
    columns = ("offset", "loss (nats)", "perplexity", "accuracy", "targets")
    table = Table(*columns, title=f"{config.model} on {config.input}")
    for head in losses:
        perplexity = math.exp(head.loss) if head.loss < 700 else math.inf
        accuracy = f"{head.accuracy:.1%}"
        table.add_row(str(head.offset), f"{head.loss:.4f}", f"{perplexity:.2f}", accuracy, f"{head.targets:,}")
    Console(markup=False).print(table)
    return losses


def run_record(place: Location) -> dict[str, Any] | None:
    """What a training run says of itself; None for a model that is not one.

    Raises:
        UserError: the run is not finished.
    """
    record = place / "run.json"
    if not record.exists():
        return None
    if not (place / "model").is_dir():
        raise UserError(f"--model {place}: this training run is not finished; repeat its command first")
    return read_json(record)
