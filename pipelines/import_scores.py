"""`wmtp import`: adds columns that other tools computed to a shard set."""

from rich.table import Table

from weighted_mtp.pipelines.reports.column_sizes import size_cells
from weighted_mtp.pipelines.reports.console import new_console, shell_command
from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.notebook import STATISTICS, statistics_cells
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.imports.run import ImportProgress, import_scores


def run(config: ImportConfig) -> ShardSet:
    """Import score files with a progress bar, and print statistics of the new columns.

    Raises:
        UserError: the input, the score files or the output are unsuitable.
    """
    progress: ImportProgress | None = None
    with ProgressBar(unit="tokens", unit_scale=True, desc="import", leave=False) as bar:

        def show(current: ImportProgress) -> None:
            nonlocal progress
            progress = current
            bar.update(current.tokens - bar.n)

        shards = import_scores(config, show)
    if progress is None:
        new_console().print(f"{shards.path} is already complete: {shards.manifest.tokens:,} tokens")
    else:
        print_summary(shards, ShardSet.open(config.input), progress.missing)
    return shards


def print_summary(shards: ShardSet, source: ShardSet, missing: int) -> None:
    """Print the new columns of `shards`, the number of sequences without scores, and the next command."""
    manifest, before = shards.manifest, source.manifest
    sizes = size_cells(shards)
    table = Table("column")
    for heading in ("missing", *STATISTICS, "B/token"):
        table.add_column(heading, justify="right")
    for name, kind in manifest.corpus.sequence_columns.items():
        if name not in before.corpus.sequence_columns:
            table.add_row(f"{name} ({kind})", *[""] * (1 + len(STATISTICS)), sizes[name])
    new = [name for name in manifest.columns if name not in before.columns]
    for name in new:
        statistics = manifest.columns[name].statistics
        table.add_row(name, f"{statistics.missing:,}", *statistics_cells(statistics), sizes[name])
    console = new_console()
    console.print(table)
    console.print(f"{manifest.tokens:,} tokens in {manifest.rows:,} sequences, {missing:,} of them without scores")
    if new:
        console.print(shell_command("next: wmtp weights {} --weights.formula {}", shards.path, new[0]))
    else:
        console.print(shell_command("next: wmtp inspect {}", shards.path))
