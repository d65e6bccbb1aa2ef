"""`wmtp iterate`: alternates scoring and training; the model of each round is the reference of the next.

This gives self-evolving references (Token Cleaning, arXiv 2502.01968). A round consists of `OUTPUT/round-N/scored`,
which adds its reference's columns to those of earlier rounds, and `OUTPUT/round-N/run`. A stopped command skips
finished parts and resumes the unfinished one.
"""

import gc
import json
import os
from collections.abc import Collection
from typing import Any

import torch

from weighted_mtp.pipelines import score, train
from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.pipelines.reports.rounds_table import describe_round, print_rounds
from weighted_mtp.schemas.configs import IterateConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Condition, Contrast
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import read_json_file, write_text
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.weights.nodes import columns_of

SUMMARY = "summary.json"


def run(config: IterateConfig) -> None:
    """Run all unfinished rounds and print one table.

    Raises:
        UserError: scoring or training fails, a launcher started several processes, or the output holds another summary.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this command starts its own processes; run it without a launcher, and use --train.ray_workers")
    summary_file = config.output / SUMMARY
    earlier = read_json_file(summary_file) if summary_file.exists() else {"rounds": []}
    if not isinstance(earlier, dict) or "rounds" not in earlier:
        raise UserError(f"{config.output}: already holds something else ({SUMMARY}); choose another --output")
    console = new_console()
    source: Location = config.input
    reference = config.reference
    model = config.model or config.base
    rounds: list[dict[str, Any]] = []
    for number in range(1, config.rounds + 1):
        directory = config.output / f"round-{number}"
        suffix = f"_{number}" if number > 1 else ""
        console.print(f"round {number} of {config.rounds}: {directory}", style="bold")
        scoring = config.scoring(input=source, output=directory / "scored", reference=reference, suffix=suffix)
        scored = score.run(scoring)
        assert scored is not None
        added = scored.manifest.columns.keys() - ShardSet.open(source).manifest.columns.keys()
        training = config.training(input=scored.path, output=directory / "run", model=model)
        training = use_round_columns(training, added, scoring.suffix)
        summary = train.run(training)
        assert summary is not None
        release_memory()
        fingerprint = reference_fingerprint(scored, added, scoring.suffix)
        rounds.append(describe_round(number, scored, fingerprint, training, summary))
        source, reference = scored.path, str(directory / "run" / "model")
        if not config.fresh:
            model = str(directory / "run")
    write_text(summary_file, json.dumps({"rounds": rounds}, indent=2) + "\n")
    print_rounds(rounds)


def use_round_columns(training: TrainConfig, added: Collection[str], suffix: str) -> TrainConfig:
    """Training settings whose weights read the columns added in this round, if there are any."""
    names = {column: name_in_round(column, added, suffix) for column in columns_of(training.weights.node)}
    return training.model_copy(update={"weights": training.weights.with_columns(names)})


def name_in_round(column: str, added: Collection[str], suffix: str) -> str:
    """Name of a column in a round. Columns shared by all rounds, such as `loss_base`, have no suffix.

    Only columns added in the round count, because a user's own column may also end in the suffix.
    """
    return column + suffix if column + suffix in added else column


def reference_fingerprint(scored: ShardSet, added: Collection[str], suffix: str) -> str:
    """Fingerprint of the reference model of a round."""
    columns = scored.manifest.columns
    excess = columns[name_in_round("excess_loss", added, suffix)].origin
    assert isinstance(excess, Contrast)
    reference = columns[excess.subtrahend].origin
    assert isinstance(reference, Condition)
    return reference.fingerprint


def release_memory() -> None:
    """Free GPU memory for the engines of the next round."""
    gc.collect()
    torch.cuda.empty_cache()
