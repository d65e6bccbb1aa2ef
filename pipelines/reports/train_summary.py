"""The final screen of `wmtp train`."""

from typing import Any

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.schemas.configs import TrainConfig


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
        table.add_row("targets with weight", f"{summary['selected_share']:.1%}")
    for name, counter in (("steps skipped, not finite", "bad_steps"), ("steps without signal", "no_signal_steps")):
        if summary[counter]:
            table.add_row(name, f"{summary[counter]:,}")
    for part in config.heads.predictions:
        if f"eval_loss_{part}" in summary:
            loss, accuracy = summary[f"eval_loss_{part}"], summary[f"eval_accuracy_{part}"]
            table.add_row(f"held-out, {prediction_title(part)}", f"{loss:.4f} nats, {accuracy:.1%} right")
    table.add_row("peak memory", f"{summary['memory_gib']:.2f} GiB")
    table.add_row("trunk (Hugging Face)", str(config.output / "model"))
    table.add_row("heads", str(config.output / "heads"))
    table.add_row("metrics", str(config.output / "metrics.jsonl"))
    table.add_row("next", f"wmtp evaluate --model {config.output} --input SET")
    new_console().print(table)


def prediction_title(part: str) -> str:
    """Display name of an entry of `HeadsConfig.predictions`."""
    return f"offset {part}" if part.isdigit() else "token order" if part == "top" else part.replace("_", " ")
