"""Mixtures: training rows from several corpora, each with a fixed share of the rows.

The number of a row in the stream determines its set, and each set has its own stream. The order therefore does not
depend on the batch size or the number of devices. The state holds each set's position and number of rows drawn.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, tee

import numpy as np
from pydantic import BaseModel

from weighted_mtp.schemas.configs import TrainConfig, exact, split_paths
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import LoaderState, RowLoader
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.weighting import make_weighting


class MixState(BaseModel):
    """Number of rows drawn from each set, and the position in each."""

    drawn: tuple[int, ...]
    sets: tuple[LoaderState, ...]


class MixedLoader:
    """Rows of several sets in fixed shares; each set starts again when it ends. Otherwise like `RowLoader`.

    Args:
        loaders: the stream of each set; their shard numbers must not overlap.
        shares: share of each set, positive, summing to 1.
    """

    def __init__(self, loaders: Sequence[RowLoader], shares: Sequence[Fraction]) -> None:
        self.loaders = loaders
        self.shares = shares
        self.drawn = (0,) * len(loaders)

    @property
    def state(self) -> MixState:
        """Position in the stream."""
        return MixState(drawn=self.drawn, sets=tuple(loader.state for loader in self.loaders))

    @state.setter
    def state(self, state: MixState) -> None:
        self.drawn = state.drawn
        for loader, position in zip(self.loaders, state.sets, strict=True):
            loader.state = position

    def batches(self, rows: int) -> Iterator[Rows]:
        """Yield batches of exactly `rows` rows without end, starting at `state` and advancing it."""
        origins, *copies = tee(assign_rows(self.shares, self.drawn, rows), 1 + len(self.loaders))
        draws = [loader.draw(_counts(copies[i], i)) for i, loader in enumerate(self.loaders)]
        for origin, *drawn in zip(origins, *draws, strict=True):
            self.drawn = tuple(before + len(rows.tokens) for before, rows in zip(self.drawn, drawn, strict=True))
            # Concatenated, the rows are sorted by origin; undo the sort.
            yield Rows.concatenate(drawn).take(np.argsort(np.argsort(origin, kind="stable")))

    def rows_per_epoch(self) -> float:
        """Number of rows, over all sets, in one pass over the first set."""
        return self.loaders[0].rows_per_epoch() / float(self.shares[0])

    def files(self, sources: Iterable[np.ndarray]) -> list[str]:
        """Distinct paths of the shards that contributed to rows with these `Rows.sources`, in order."""
        sources = list(sources)
        return [file for loader in self.loaders for file in loader.files(sources)]


def assign_rows(shares: Sequence[Fraction], drawn: Sequence[int], rows: int) -> Iterator[np.ndarray]:
    """Assign rows to two or more sets that already have `drawn` rows each; yields set numbers (rows,).

    Among the sets that are behind their share, choose the one whose next row is due first. This keeps the number of
    rows of each of n sets within `1 - 1 / (2n - 2)` of its share at all times, the best possible bound (Tijdeman, The
    chairman assignment problem, 1980). Choosing the set that is furthest behind can exceed even a bound of 1.
    """
    counts, scale = list(drawn), 2 * len(shares) - 2
    whole = math.lcm(*(share.denominator for share in shares))
    numerators = [int(share * whole) for share in shares]
    common = math.lcm(*numerators)

    def assign() -> int:
        row = sum(counts) + 1
        behind = [i for i, part in enumerate(numerators) if scale * (part * row - whole * counts[i]) >= whole]
        chosen = min(behind, key=lambda i: (scale * (counts[i] + 1) - 1) * (common // numerators[i]))
        counts[chosen] += 1
        return chosen

    while True:
        yield np.array([assign() for _ in range(rows)])


def _counts(origins: Iterator[np.ndarray], number: int) -> Iterator[int]:
    return (int((origin == number).sum()) for origin in origins)


def open_mix(mix: Iterable[str]) -> list[ZippedSets]:
    """Open the sets with these names in `--mix`.

    Raises:
        UserError: a set cannot be opened.
    """
    return [ZippedSets.open(split_paths(name)) for name in mix]


def mix_identity(config: TrainConfig, mixed: Sequence[ZippedSets]) -> dict[str, str]:
    """Identity of the mixture, to compare when a run is resumed: sets and shares in order; empty without --mix."""
    sets = [f"{share} {shards.digest}" for share, shards in zip(config.mix.values(), mixed, strict=True)]
    return {"mix": "; ".join(sets)} if sets else {}


def make_loader(
    config: TrainConfig,
    shards: ZippedSets,
    mixed: Sequence[ZippedSets],
    sequence_length: int,
    progress: MakeBar = hidden_bar,
) -> RowLoader | MixedLoader:
    """The training rows of a run, from --input and --mix; each set is weighted by its own statistics.

    Raises:
        UserError: a set lacks a score column, or has nothing to predict.
    """
    sets = (shards, *mixed)
    ends = accumulate((len(data.first.manifest.shards) for data in sets), initial=0)
    loaders = [
        RowLoader(
            data,
            make_weighting(config.weights, data, progress=progress),
            sequence_length,
            seed=_seed(config.seed, number),
            workers=config.loader_workers,
            first_shard=first_shard,
        )
        for number, (data, first_shard) in enumerate(zip(sets, ends, strict=False))
    ]
    if not mixed:
        return loaders[0]
    shares = [exact(share) for share in config.mix.values()]
    return MixedLoader(loaders, [Fraction(1) - sum(shares), *shares])


def _seed(seed: int, number: int) -> int:
    """Seed of set `number`. --input uses the run's seed, so its order does not depend on the mixture."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) if number else seed
