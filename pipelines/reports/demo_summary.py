"""The final screen of `wmtp demo`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.pipelines.reports.train_summary import held_out_loss


def print_results(root: Path, results: dict[str, dict[str, Any]], offsets: Sequence[int], seconds: float) -> None:
    """Print each model's losses on the held-out documentation, and commands to try next.

    Args:
        root: directory of the demo.
        results: content of each model's `summary.json`, by name.
        offsets: prediction offsets of the students.
        seconds: duration of the demo.
    """
    console = new_console()
    console.print()
    console.print(results_table(results, offsets))
    loss = {name: result["eval_loss_1"] for name, result in results.items()}
    console.print(
        f"static Rho-1 against uniform: {loss['static Rho-1'] - loss['uniform']:+.4f} nats, "
        f"against its shuffled control: {loss['static Rho-1'] - loss['shuffled control']:+.4f} nats "
        "(negative is better; one seed)"
    )
    console.print(f"all files are in {root}; this run took {seconds:.0f} s\n")
    scored, models = root / "scored", root / "models"
    console.print("try next:")
    console.print(shell_command("  wmtp inspect {} --column excess_loss", scored))
    console.print(shell_command("  wmtp verify {}", scored))
    held_out = root / "tokens" / "held-out"
    console.print(shell_command("  wmtp evaluate --model {} --input {}", models / "static-rho-1", held_out))
    settings = "--sequence_length 256 --max_steps 100 --weights.preset soft-threshold"
    command = f"  wmtp train --input {{}} --model {{}} --output runs/mine {settings}"
    console.print(shell_command(command, scored, models / "base" / "model"))


def results_table(results: dict[str, dict[str, Any]], offsets: Sequence[int]) -> Table:
    """One row for each model: losses, tokens, share of targets with weight, and time."""
    table = Table(title="held-out documentation: loss ± standard error, nats per token", title_justify="left")
    table.add_column("model", no_wrap=True)
    for offset in offsets:
        table.add_column(f"offset {offset}", justify="right")
    for column in ("tokens", "selected", "time"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            *(held_out_loss(result, str(offset)) for offset in offsets),
            f"{result['tokens']:,}",
            f"{result['selected_share']:.0%}",
            f"{result['seconds']:.0f} s",
            end_section=name == "reference",
        )
    return table
