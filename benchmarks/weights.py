"""Tokens weighted by the loader per CPU second, for each scheme that uses only stored columns.

    .venv/bin/python benchmarks/weights.py [--rounds 9]

Each scheme is applied to row groups of a shard set, in memory, with one thread. Equivalent polars expressions on flat
columns must give equal weights. Both alternate; results are medians over the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["POLARS_MAX_THREADS"] = "1"

import numpy as np
import polars as pl
import pyarrow as pa
from loader import make_set
from rich.console import Console
from rich.table import Table

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.weighting import Weighting, make_weighting

TOKENS = 1 << 20
COLUMNS = ("loss_reference", "entropy_reference", "excess_loss", "long_short")
SEQUENCE = "sequence"


def corpus_top(column: str, fraction: float) -> Callable[[pl.DataFrame], pl.Expr]:
    """Select the top scores of the whole frame; the threshold is computed once, as in this project."""

    def make(frame: pl.DataFrame) -> pl.Expr:
        kept = int(np.ceil(fraction * len(frame) - 1e-9))
        return (pl.col(column) >= frame[column].sort(descending=True)[kept - 1]).cast(pl.Float32)

    return make


def mean_one(make: Callable[[pl.DataFrame], pl.Expr]) -> Callable[[pl.DataFrame], pl.Expr]:
    """Divide weights by their mean over the whole frame, which is computed once."""
    return lambda frame: make(frame) / frame.select(make(frame).cast(pl.Float64).mean()).item()


def of_sequence(weights: pl.Expr) -> Callable[[pl.DataFrame], pl.Expr]:
    """Weights with mean 1 in each sequence."""
    return lambda frame: (weights / weights.mean().over(SEQUENCE)).fill_nan(0.0)


def sparse(frame: pl.DataFrame) -> pl.Expr:
    """The 60 % largest absolute scores of each sequence, normalised to mean 1."""
    size = pl.col("long_short").abs()
    kept = (0.6 * size.count().over(SEQUENCE) - 1e-9).ceil()
    top = (size.rank("max").over(SEQUENCE) > size.count().over(SEQUENCE) - kept).cast(pl.Float32)
    return top / top.mean().over(SEQUENCE)


LONG_SHORT = pl.col("long_short")
SCHEMES: dict[str, Callable[[pl.DataFrame], pl.Expr]] = {
    "rho1-static": mean_one(corpus_top("excess_loss", 0.6)),
    "self-reference": mean_one(
        lambda frame: pl.min_horizontal(
            (pl.col(name) <= frame[name].sort()[int(np.ceil(0.6 * len(frame) - 1e-9)) - 1]).cast(pl.Float32)
            for name in ("loss_reference", "entropy_reference")
        )
    ),
    "dense": lambda frame: 0.75 + 0.25 * of_sequence(LONG_SHORT.abs())(frame),
    "sparse": sparse,
    "longce": lambda frame: LONG_SHORT.exp().clip(upper_bound=5.0),
    "ppmi": of_sequence(LONG_SHORT.clip(lower_bound=0.0)),
    "npmi": of_sequence((-LONG_SHORT).clip(lower_bound=0.0)),
    "soft-threshold": mean_one(lambda frame: pl.col("excess_loss").clip(0.0, 1.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of times each scheme is applied")
    rounds = parser.parse_args().rounds
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as work:
        shards = ZippedSets((make_set(Path(work) / "set", TOKENS, COLUMNS),))
        print(f"{os.cpu_count()} cores, load average before {os.getloadavg()[0]:.1f}", flush=True)
        Console(width=110).print(measure(shards, rounds))


def measure(shards: ZippedSets, rounds: int) -> Table:
    """Time all schemes; one table row for each."""
    groups = [
        shards.read(shard, COLUMNS, group)
        for shard, entry in enumerate(shards.first.manifest.shards)
        for group in range(entry.row_groups)
    ]
    frames = [to_frame(table) for table in groups]
    corpus = pl.concat(frames)
    tokens = shards.first.manifest.tokens
    table = Table("scheme", title=f"{tokens:,} tokens in {len(groups)} row groups, one thread")
    for name in ("Mtok per CPU second", "minimum", "polars", "times polars"):
        table.add_column(name, justify="right")
    for control in ("none", "shuffled", "random"):
        for preset, expression in SCHEMES.items():
            weighting = make_weighting(WeightsConfig(preset=preset, control=control), shards)
            own = partial(weigh_tables, weighting, groups)
            others = partial(weigh_frames, expression(corpus), frames)
            if control == "none":
                check_equal(preset, own(), others(), groups)
            rates = [(tokens / seconds(own), tokens / seconds(others)) for _ in range(rounds)]
            ours, theirs = zip(*rates, strict=True)
            figures = [f"{rate / 1e6:.1f}" for rate in (statistics.median(ours), min(ours), statistics.median(theirs))]
            if control == "none":
                ratio = statistics.median(one / other for one, other in rates)
                table.add_row(preset, *figures, f"{ratio:.1f}")
            elif preset in ("rho1-static", "dense"):
                table.add_row(f"{preset}, {control}", *figures[:2], "", "")
    table.caption = f"medians of {rounds} rounds; the ratio is the median of the rounds' ratios"
    return table


def weigh_tables(weighting: Weighting, groups: list[pa.Table]) -> list[np.ndarray]:
    """This project's weights for row groups."""
    rng = np.random.default_rng(0)
    return [weighting.weigh(group, rng) for group in groups]


def weigh_frames(weights: pl.Expr, frames: list[pl.DataFrame]) -> list[pl.Series]:
    """The weights computed by polars."""
    return [frame.select(weights).to_series() for frame in frames]


def to_frame(table: pa.Table) -> pl.DataFrame:
    """The scored tokens of a row group as flat float32 columns, with each token's sequence number."""
    lengths = list_lengths(table["input_ids"])
    columns = {name: flat_values(table[name]).astype(np.float32) for name in COLUMNS}
    frame = pl.DataFrame({SEQUENCE: np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths), **columns})
    return frame.filter(pl.col("excess_loss").is_not_nan())


def check_equal(preset: str, own: list[np.ndarray], others: list[pl.Series], groups: list[pa.Table]) -> None:
    """Raise AssertionError unless both computed the same weights."""
    for weights, expected, group in zip(own, others, groups, strict=True):
        scored = np.isfinite(flat_values(group["excess_loss"]))
        np.testing.assert_allclose(weights[scored], expected.to_numpy(), rtol=1e-4, atol=1e-6, err_msg=preset)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds used by `work`."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
