"""Screens of `wmtp score`: the final summary, and the dry run."""

from dataclasses import dataclass

import polars as pl
from rich.table import Table

from weighted_mtp.pipelines.reports.column_sizes import size_cells
from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.schemas.shard_set.notebook import STATISTICS, statistics_cells
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.job.report import DryRun
from weighted_mtp.scoring.job.units import read_records

SUGGESTED_PRESETS = {"excess_loss": "rho1-static", "long_short": "dense"}
"""Weight preset to suggest for the next command, by contrast."""
H100_FLOPS = 989e12
"""Dense bfloat16 FLOP/s of an H100 or H200."""
UTILISATION = 0.4
"""Assumed utilisation of `H100_FLOPS` by scoring."""
SAMPLED_RECORDS = 64
FREQUENT_REASONS = 5


@dataclass(frozen=True)
class Scored:
    """Statistics of a run.

    Attributes:
        tokens: tokens scored by this run.
        resumed: shards completed by earlier runs.
        seconds: from the first ready worker to the last shard.
        incidents: lost workers, out-of-memory errors, waits for resources.
    """

    tokens: int = 0
    resumed: int = 0
    seconds: float = 0.0
    incidents: int = 0


def print_summary(shards: ShardSet, scored: Scored) -> None:
    """Print statistics of the columns, the speed, and the next command."""
    manifest = shards.manifest
    sizes = size_cells(shards)
    table = Table("column")
    for name in (*STATISTICS, "B/token"):
        table.add_column(name, justify="right")
    for name, column in manifest.columns.items():
        table.add_row(name, *statistics_cells(column.statistics), sizes[name])
    console = new_console()
    console.print(table)
    facts = [f"{manifest.tokens:,} tokens in {len(manifest.shards):,} shards"]
    if scored.tokens:
        rate = scored.tokens / scored.seconds
        facts.append(f"scored {scored.tokens:,} in {scored.seconds:.1f} s ({rate:,.0f} tokens/s)")
    if scored.resumed:
        facts.append(f"shards already done: {scored.resumed:,}")
    if scored.incidents:
        facts.append(f"incidents: {scored.incidents}, see above")
    console.print("; ".join(facts))
    if rejects := sum(shard.rejects for shard in manifest.shards):
        console.print(f"{rejects:,} sequences could not be scored, see {shards.path / REJECTS}")
        for line in frequent_reasons(shards.path / REJECTS):
            console.print(f"    {line}")
    preset = next((SUGGESTED_PRESETS[name] for name in manifest.columns if name in SUGGESTED_PRESETS), "uniform")
    command = "next: wmtp train --input {} --model MODEL --output RUN --weights.preset {}"
    console.print(shell_command(command, shards.path, preset))


def readable_hours(hours: float) -> str:
    """A number of hours with at least two digits, or an upper bound if it is tiny."""
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= 0.01 else "less than 0.01"


def frequent_reasons(rejects: Location) -> list[str]:
    """The most frequent reasons in a `rejects.jsonl` of scoring, with numbers replaced by N."""
    reason = pl.col("reason").str.replace_all(r"\d+", "N")
    found = pl.read_ndjson(rejects.read_bytes()).group_by("model", reason).len().sort("len", descending=True)
    return [f"{count:,} x {model}: {why}" for model, why, count in found.head(FREQUENT_REASONS).iter_rows()]


def print_dry_run(run: DryRun) -> None:
    """Print the work of a run, its estimated cost, and the work already done."""
    output, source, plan, done = run.output, run.source, run.plan, run.done
    shards = source.manifest.shards
    missing = [shard for shard in shards if shard.name not in done]
    tokens, sequences = sum(shard.tokens for shard in missing), sum(shard.rows for shard in missing)
    table = Table(show_header=False, title=f"{output}: not written, this is a dry run", title_justify="left")
    table.add_row("columns to compute", ", ".join(plan.columns))
    if plan.stored:
        table.add_row("columns to reuse", ", ".join(plan.stored))
    there = f"; {len(done):,} already done" if done else ""
    table.add_row("shards to score", f"{len(missing):,} of {len(shards):,}{there}")
    table.add_row("tokens to score", f"{tokens:,} of {source.manifest.tokens:,}")
    flops = 0.0
    for model in plan.models:
        computed = plan.computed_by(model, tokens, sequences)
        flops += 2 * model.parameters * computed
        parameters = f"{model.parameters:,} parameters" if model.parameters else "quantised, parameters unknown"
        table.add_row("tokens to compute", f"at most {computed:,.0f} by {model.name} ({parameters})")
    if plan.models and all(model.parameters for model in plan.models):
        hours = readable_hours(flops / (UTILISATION * H100_FLOPS) / 3600)
        assumed = f"2 FLOPs per parameter and token, {UTILISATION:.0%} of an H100's {H100_FLOPS / 1e12:.0f} TFLOPS"
        table.add_row("estimate", f"{hours} GPU hours ({assumed})")
    if done:
        sample = sorted(done)[:: -(-len(done) // SAMPLED_RECORDS)]
        records = [record for record, _ in read_records(output, sample)]
        seconds = sum(record.score_seconds for record in records)
        rate = sum(record.entry.tokens for record in records) / max(1e-3, seconds)
        left = f"{readable_hours(tokens / rate / 3600)} worker hours left"
        table.add_row("measured so far", f"{rate:,.0f} tokens/s in one worker's engines: {left}")
    new_console().print(table)
