"""The screen at the end of `wmtp score`."""

from rich.console import Console
from rich.table import Table

from schemas.shard_set import ShardSet

PRESETS = {"excess_loss": "rho1-static", "long_short": "dense"}
"""A weighting scheme for each contrast, for the command that comes next."""


def print_summary(scored: ShardSet, tokens: int, resumed: int, seconds: float) -> None:
    """Print what the columns hold, how fast it went, and the next command.

    Args:
        tokens: how many this run scored.
        resumed: shards that an earlier run had scored.
        seconds: duration of this run.
    """
    manifest = scored.manifest
    sizes = scored.column_bytes()
    table = Table("column", *[f"{name:>6}" for name in ("mean", "std", "1%", "50%", "99%", "B/token")])
    for name, column in manifest.columns.items():
        of = column.statistics
        quantiles = [of.quantiles.get(q) for q in ("0.01", "0.5", "0.99")]
        numbers = ["-" if value is None else f"{value:.3f}" for value in (of.mean, of.std, *quantiles)]
        table.add_row(name, *numbers, f"{sizes[name] / max(1, manifest.tokens):.2f}")
    console = Console(markup=False)
    console.print(table)
    console.print(
        f"{manifest.tokens:,} tokens in {len(manifest.shards)} shards; scored {tokens:,} in {seconds:.1f} s "
        f"({tokens / seconds:,.0f} tokens/s)" + (f"; {resumed} shards were done before" if resumed else ""),
        highlight=False,
        soft_wrap=True,
    )
    preset = next((PRESETS[name] for name in manifest.columns if name in PRESETS), "uniform")
    command = f"wmtp train --input {scored.path} --model MODEL --output RUN --weights.preset {preset}"
    console.print(f"next: {command}", highlight=False, soft_wrap=True)
