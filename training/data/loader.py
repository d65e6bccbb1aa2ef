"""Streams a shard set as packed training rows, in an order that depends only on the seed.

A block is a few row groups, drawn at random from the whole set, packed and shuffled together. Threads prepare the next
blocks; only these and the current one are in memory. The order of rows is the same for any number of devices or threads
and any batch size, so the position `{epoch, block, row}` is the complete state.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import repeat
from threading import Event
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.packing import pack
from weighted_mtp.training.data.prefetch import AbandonedError, prefetch
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.weighting import Weighting

BLOCK_TOKENS = 1 << 20
BLOCK_ROWS = 64
MOST_BATCH_TOKENS = 1 << 28
"""Most tokens of a batch, which is held in memory."""


def block_tokens(sequence_length: int) -> int:
    """Tokens to pack at a time into rows of `sequence_length` tokens."""
    return max(BLOCK_TOKENS, BLOCK_ROWS * sequence_length)


def check_targets(shards: ShardSet) -> None:
    """Raise UserError if no sequence of a set has two tokens."""
    if shards.manifest.tokens == shards.manifest.rows:
        raise UserError(
            f"{shards.path}: no sequence has two tokens, so there is nothing to predict; prepare longer texts"
        )


def check_batch(rows: int, sequence_length: int, name: str) -> None:
    """Raise UserError if a batch of this many rows is too large; `name` is the setting."""
    if rows * sequence_length > MOST_BATCH_TOKENS:
        raise UserError(
            f"{name} {rows}: {rows:,} rows of {sequence_length:,} tokens; at most {MOST_BATCH_TOKENS:,} tokens are "
            f"possible, so give at most {MOST_BATCH_TOKENS // sequence_length}"
        )


Number = Annotated[int, Field(ge=0)]


class LoaderState(BaseModel):
    """Position in the stream: the next row is row `row` of block `block` of epoch `epoch`."""

    epoch: Number = 0
    block: Number = 0
    row: Number = 0


class RowLoader:
    """Packed rows of a shard set, or of several zipped sets, epoch after epoch.

    Args:
        shards: the sets to read; all have the same rows.
        weighting: turns their columns into weights.
        sequence_length: tokens per packed row.
        seed: seed of the order and of random controls.
        workers: threads that prepare blocks ahead, one each.
        first_shard: number of the set's first shard in `Rows.sources`.
    """

    def __init__(
        self,
        shards: ZippedSets,
        weighting: Weighting,
        sequence_length: int,
        *,
        seed: int = 0,
        workers: int = 1,
        first_shard: int = 0,
    ) -> None:
        check_targets(shards.first)
        manifest = shards.first.manifest
        self.shards = shards
        self.weighting = weighting
        self.sequence_length = sequence_length
        self.seed = seed
        self.workers = workers
        self.first_shard = first_shard
        self.state = LoaderState()
        self.group_ends = np.cumsum([shard.row_groups for shard in manifest.shards], dtype=np.int64)
        """Cumulative number of row groups per shard. Row groups are numbered through the whole set."""
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))
        groups = int(self.group_ends[-1])
        self.groups_per_block = max(1, round(block_tokens(sequence_length) * groups / manifest.tokens))

    def batches(self, rows: int) -> Iterator[Rows]:
        """Yield batches of exactly `rows` rows without end, starting at `state` and advancing it."""
        return self.draw(repeat(rows))

    def draw(self, counts: Iterable[int]) -> Iterator[Rows]:
        """Yield exactly `count` rows for each of `counts`, starting at `state` and advancing it.

        Raises:
            UserError: `state` is no position in the set.
        """
        block_number, row = self.state.block, self.state.row
        beyond = f"{self.shards.first.path}: has no row {row:,} of block {block_number:,}; give a position in this set"
        if block_number >= self._blocks_per_epoch():
            raise UserError(beyond)
        with closing(prefetch(self._load, self._positions(), self.workers)) as blocks:
            at, block = next(blocks)
            if row > len(block.tokens):
                raise UserError(beyond)
            for count in counts:
                pieces: list[Rows] = []
                missing = count
                while True:
                    pieces.append(block.take(slice(row, row + missing)))
                    row += len(pieces[-1].tokens)
                    missing -= len(pieces[-1].tokens)
                    if not missing:
                        break
                    del block  # free it before the next one
                    at, block = next(blocks)
                    row = 0
                self.state = at.model_copy(update={"row": row})
                yield Rows.concatenate(pieces) if pieces[1:] else pieces[0]

    def rows_per_epoch(self) -> float:
        """Number of rows of the set, extrapolated from its first block (exact for a single block)."""
        block = self._load(LoaderState(), Event())
        return len(block.tokens) / float(block.tokens.sum()) * self.shards.first.manifest.tokens

    def files(self, sources: Iterable[np.ndarray]) -> list[str]:
        """Distinct paths of this set's shards that contributed to rows with these `Rows.sources`, in order."""
        numbers = {int(number) - self.first_shard for source in sources for number in source}
        held = sorted(number for number in numbers if 0 <= number < len(self.group_ends))
        return [str(path) for number in held for path in self.shards.files(number, self.weighting.columns)]

    def _positions(self) -> Iterator[LoaderState]:
        """The state at the start of each block, starting at `state`."""
        at = self.state
        while True:
            yield at
            last = at.block + 1 == self._blocks_per_epoch()
            at = LoaderState(epoch=at.epoch + 1) if last else LoaderState(epoch=at.epoch, block=at.block + 1)

    def _blocks_per_epoch(self) -> int:
        return -(-int(self.group_ends[-1]) // self.groups_per_block)

    def _load(self, at: LoaderState, closed: Event) -> Rows:
        """Read, weight, pack and shuffle one block, unless the iterator is closed."""
        groups = []
        for group in self._groups(at.epoch, at.block).tolist():
            if closed.is_set():
                raise AbandonedError
            groups.append(self._read(group))
        ids, weights, lengths, shards = (np.concatenate(values) for values in zip(*groups, strict=True))
        rng = np.random.default_rng([self.seed, at.epoch, at.block])
        return pack(ids, weights, lengths, shards, self.sequence_length, rng)

    def _groups(self, epoch: int, block: int) -> np.ndarray:
        """The row group numbers of a block."""
        total = int(self.group_ends[-1])
        first = block * self.groups_per_block
        chosen = slice(first, min(first + self.groups_per_block, total))
        order = self._order
        if order[0] != epoch:  # threads may prepare blocks of two epochs at once, and then draw the same order again
            order = self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(total)
        return order[1][chosen]

    def _read(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Read a row group: ids (T,), weights (T[, components]), and lengths (S,) and shards (S,) of its sequences."""
        shard = int(np.searchsorted(self.group_ends, group, side="right"))
        row_group = group - int(self.group_ends[shard]) + self.shards.first.manifest.shards[shard].row_groups
        table = self.shards.read(shard, self.weighting.columns, row_group)
        lengths = list_lengths(table["input_ids"])
        weights = self.weighting.weigh(table, np.random.default_rng([self.seed, shard, row_group]))
        numbers = np.full(len(lengths), self.first_shard + shard)
        return flat_values(table["input_ids"]), weights, lengths, numbers
