"""The rounds of `wmtp iterate`: records for `summary.json`, and a table of them."""

from typing import Any

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.pipelines.reports.train_summary import held_out_loss
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.directory import without_nan


def describe_round(
    number: int, scored: ShardSet, reference: str, training: TrainConfig, summary: dict[str, Any]
) -> dict[str, Any]:
    """The record of one round.

    Args:
        number: number of the round, starting at 1.
        scored: shard set scored in the round and used for training.
        reference: fingerprint of the reference model.
        training: settings of the training run.
        summary: `summary.json` of that run.
    """
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
    """Print one row for each round, and the next command."""
    table = Table("round", "set", "reference", "weights", "with weight", "held-out loss")
    for record in rounds:
        share = record["selected_share"]
        table.add_row(
            str(record["round"]),
            record["set_digest"][:8],
            record["reference_fingerprint"][:8],
            record["weights"],
            "-" if share is None else f"{share:.1%}",
            held_out_loss(record, "1"),
        )
    console = new_console()
    console.print(table)
    console.print(shell_command("next: wmtp evaluate --model {} --input SET", rounds[-1]["run"]))
