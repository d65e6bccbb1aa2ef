"""`wmtp iterate`: score and train in turn, each round with what the round before has trained as its reference.

Self-evolving references (Token Cleaning, arXiv 2502.01968), and any other alternation of the two. A round is
`OUTPUT/round-N/scored`, which adds the columns of its reference to those of the rounds before, and
`OUTPUT/round-N/run`. Each part goes on where it was stopped and is left alone once it is done, so the whole does, too.
"""

import gc
import json
import os
from collections.abc import Collection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from weighted_mtp.pipelines import score, train
from weighted_mtp.schemas.configs import IterateConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Condition, Contrast
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.weights.nodes import columns_of
from weighted_mtp.training.run.directory import without_nan

SUMMARY = "summary.json"
console = Console(highlight=False, markup=False)


def run(config: IterateConfig) -> None:
    """Run all rounds, parts that are done already excepted, and print one table.

    Raises:
        UserError: a part cannot be run, or this process is one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("wmtp iterate: starts its processes itself; run it alone, with --train.ray_workers for several")
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
        training = weigh(training, added, scoring.suffix)
        summary = train.run(training)
        release_memory()
        fingerprint = reference_of(scored, added, scoring.suffix)
        rounds.append(describe_round(number, scored, fingerprint, training, summary))
        source, reference = scored.path, str(directory / "run" / "model")
        if not config.fresh:
            model = str(directory / "run")
    write_text(config.output / SUMMARY, json.dumps({"rounds": rounds}, indent=2) + "\n")
    print_rounds(rounds)


def weigh(training: TrainConfig, added: Collection[str], suffix: str) -> TrainConfig:
    """The settings with the round's own columns for the weights, where they are among those that it has added."""
    names = {column: column_in(added, column, suffix) for column in columns_of(training.weights.node)}
    return training.model_copy(update={"weights": training.weights.with_columns(names)})


def column_in(added: Collection[str], column: str, suffix: str) -> str:
    """Name that a column has in a round; one that is the same in all of them, as `loss_base` is, has no suffix.

    That a name with the suffix is in the set says nothing: it may be one of the user's own.
    """
    return column + suffix if column + suffix in added else column


def reference_of(scored: ShardSet, added: Collection[str], suffix: str) -> str:
    """Fingerprint of the reference of a round."""
    columns = scored.manifest.columns
    excess = columns[column_in(added, "excess_loss", suffix)].origin
    assert isinstance(excess, Contrast)
    reference = columns[excess.subtrahend].origin
    assert isinstance(reference, Condition)
    return reference.fingerprint


def release_memory() -> None:
    """Give the memory of a GPU back to the engines of the next round."""
    gc.collect()
    torch.cuda.empty_cache()


def describe_round(
    number: int, scored: ShardSet, reference: str, training: TrainConfig, summary: dict[str, Any]
) -> dict[str, Any]:
    """What `summary.json` says of a round."""
    summary = without_nan(summary)
    return {
        "round": number,
        "set": str(scored.path),
        "set_digest": scored.manifest.digest,
        "reference_fingerprint": reference,
        "run": str(training.output),
        "weights": training.weights.text,
        "steps": summary["steps"],
        "selected_share": summary["selected_share"],
    } | {name: value for name, value in summary.items() if name.startswith("eval_")}


def print_rounds(rounds: list[dict[str, Any]]) -> None:
    """Print a line for each round."""
    table = Table("round", "set", "reference", "weights", "with weight", "held-out loss")
    for of in rounds:
        share, loss = of["selected_share"], of.get("eval_loss_1")
        table.add_row(
            str(of["round"]),
            of["set_digest"][:8],
            of["reference_fingerprint"][:8],
            of["weights"],
            "-" if share is None else f"{share:.1%}",
            "-" if loss is None else f"{loss:.4f}",
        )
    console.print(table)
    console.print(f"next: wmtp evaluate --model {rounds[-1]['run']} --input SET", soft_wrap=True)
