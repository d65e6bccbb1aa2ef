"""The final screen of `wmtp train`."""

import math
from typing import Any

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.storage.training_run import HEADS, METRICS, MODEL


def print_summary(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print the outcome of a training run. `summary` is the content of its `summary.json`."""
    done = "already complete" if summary.get("already_complete") else "trained"
    table = Table(title=f"{config.output}: {done}", show_header=False, title_justify="left")
    continued = summary.get("continued_steps", 0)
    table.add_row("steps", f"{summary['steps']:,}" + f", {continued:,} of them after the schedule" * bool(continued))
    table.add_row("tokens", f"{summary['tokens']:,}")
    table.add_row("time", f"{summary['seconds']:,.1f} s, {summary['tokens_per_second']:,.0f} tokens/s")
    control = f", {config.weights.control} control" if config.weights.control != "none" else ""
    warmup = f", after a warm-up of {config.weights.warmup_ratio:.0%}" if config.weights.warmup_ratio else ""
    table.add_row("weights", config.weights.text + control + warmup)
    if config.objective.kind != "cross_entropy":
        settings = config.objective.model_dump(exclude={"kind"}, exclude_none=True)
        described = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        table.add_row("objective", f"{config.objective.kind.replace('_', ' ')} ({described})")
    offsets = len(config.heads.offsets)
    if (loss := summary["loss"]) is not None and loss == loss:
        order = ", with token order" * config.heads.predicts_order
        table.add_row("last logged loss" + f", sum over {offsets} offsets" * (offsets > 1) + order, f"{loss:.4f}")
        table.add_row("targets with weight", formatted(summary["selected_share"], ".1%"))
    for name, counter in (("steps skipped, not finite", "bad_steps"), ("steps without signal", "no_signal_steps")):
        if summary[counter]:
            table.add_row(name, f"{summary[counter]:,}")
    for part in config.heads.predictions:
        if f"eval_loss_{part}" in summary:
            table.add_row(f"held-out, {prediction_title(part)}", held_out(summary, part))
    if "eval_sequence_length" in summary:
        table.add_row("held-out sequence length", f"{summary['eval_sequence_length']:,}")
    table.add_row("peak memory", f"{summary['memory_gib']:.2f} GiB")
    table.add_row("trunk (Hugging Face)", str(config.output / MODEL))
    table.add_row("heads", str(config.output / HEADS))
    table.add_row("metrics", str(config.output / METRICS))
    table.add_row("next", shell_command("wmtp evaluate --model {} --input SET", config.output))
    new_console().print(table)


def held_out(summary: dict[str, Any], part: str) -> str:
    """Held-out results of an entry of `HeadsConfig.predictions`; earlier versions stored only loss and accuracy."""
    accuracy = formatted(summary.get(f"eval_accuracy_{part}"), ".1%")
    text = f"{held_out_loss(summary, part)} nats, {accuracy} right"
    if f"eval_targets_{part}" in summary:
        text += f"; {summary[f'eval_targets_{part}']:,} targets in {summary[f'eval_documents_{part}']:,} documents"
    return text


def held_out_loss(summary: dict[str, Any], part: str) -> str:
    """Held-out loss of an entry of `HeadsConfig.predictions`, with its standard error if it has one; "-" without it."""
    loss, error = (summary.get(f"eval_{name}_{part}") for name in ("loss", "standard_error"))
    margin = "" if error is None or math.isnan(error) else f" ± {error:.4f}"
    return formatted(loss, ".4f") + margin


def formatted(value: float | None, form: str) -> str:
    """A number in a format; "-" for NaN, which is None in JSON."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def prediction_title(part: str) -> str:
    """Display name of an entry of `HeadsConfig.predictions`."""
    return f"offset {part}" if part.isdigit() else "token order" if part == "top" else part.replace("_", " ")
