"""Streams a shard set as packed training rows, in an order that depends on the seed alone.

A block is a few row groups, drawn at random from the whole set, packed and shuffled together; it is all that is ever in
memory, with the next one being prepared in a thread. The order of rows is the same for any number of devices and any
micro-batch size, so the position in it, `{epoch, block, row}`, is all the state there is.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from schemas.errors import UserError
from schemas.shards import ROW_GROUP_TOKENS, flat_values, list_lengths
from schemas.zipped import ZippedSets
from training.packing import pack
from training.weights import StoredScores, Weighting

BLOCK_TOKENS = 1 << 20
BLOCK_ROWS = 64


class Rows(NamedTuple):
    """Packed rows: `input_ids` (B, L) int32, `position_ids` (B, L) int32, `weights` (B, L) float32.

    `tokens` (B,) int64 counts the tokens of each row that are not padding.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray

    def take(self, index: np.ndarray | slice) -> "Rows":
        """The rows at `index`."""
        return Rows(*(values[index] for values in self))


class LoaderState(BaseModel):
    """Position in the stream: the next row is row `row` of block `block` of epoch `epoch`."""

    epoch: int = 0
    block: int = 0
    row: int = 0


class RowLoader:
    """Packed rows of a shard set, or of several zipped, epoch after epoch.

    Args:
        shards: the set to read, or sets of the same rows.
        weighting: turns its score column into weights.
        sequence_length: tokens per packed row.
        seed: seed of the order and of random controls.
        shuffle: False reads the set once through in its own order of row groups (evaluation).
    """

    def __init__(
        self,
        shards: ZippedSets,
        weighting: Weighting | StoredScores,
        sequence_length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.shards = shards
        self.weighting = weighting
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.state = LoaderState()
        self.group_ends = np.cumsum([shard.row_groups for shard in shards.first.manifest.shards], dtype=np.int64)
        """Row groups of each shard and all before it: of row groups, numbered through, only the order is kept."""
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))
        self.groups_per_block = max(BLOCK_TOKENS, BLOCK_ROWS * sequence_length) // ROW_GROUP_TOKENS
        if shards.first.manifest.tokens == shards.first.manifest.rows:
            raise UserError(
                f"{shards.first.path}: has no sequence of two tokens, so nothing to predict; prepare longer texts"
            )

    def batches(self, rows: int) -> Iterator[Rows]:
        """Yield batches of exactly `rows` rows without end, from `state` on; `state` follows what was yielded."""
        held: list[Rows] = []
        for block, at in self._blocks():
            epoch, index, row = at.epoch, at.block, at.row
            while row < len(block.input_ids):
                wanted = rows - sum(len(part.input_ids) for part in held)
                held.append(block.take(slice(row, row + wanted)))
                row += len(held[-1].input_ids)
                if sum(len(part.input_ids) for part in held) == rows:
                    self.state = LoaderState(epoch=epoch, block=index, row=row)
                    yield Rows(*(np.concatenate(parts) for parts in zip(*held, strict=True)))
                    held = []

    def once(self, rows: int) -> Iterator[Rows]:
        """Yield the set once through in batches of at most `rows` rows."""
        for index in range(self._blocks_per_epoch()):
            block = self._load(0, index)
            for row in range(0, len(block.input_ids), rows):
                yield block.take(slice(row, row + rows))

    def rows_per_epoch(self) -> float:
        """How many rows the set gives, extrapolated from how well its first block packs (exact for a single block)."""
        block = self._load(0, 0)
        return len(block.tokens) / float(block.tokens.sum()) * self.shards.first.manifest.tokens

    def _blocks(self) -> Iterator[tuple[Rows, LoaderState]]:
        """Yield every block with the state at which it is entered, preparing one ahead in a thread."""
        at = self.state
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self._load, at.epoch, at.block)
            while True:
                block = following.result()
                last = at.block + 1 == self._blocks_per_epoch()
                after = LoaderState(epoch=at.epoch + 1) if last else LoaderState(epoch=at.epoch, block=at.block + 1)
                following = pool.submit(self._load, after.epoch, after.block)
                yield block, at
                at = after

    def _blocks_per_epoch(self) -> int:
        return -(-int(self.group_ends[-1]) // self.groups_per_block)

    def _load(self, epoch: int, block: int) -> Rows:
        """Read, weigh, pack and shuffle one block."""
        if self.shuffle and self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(int(self.group_ends[-1]))
        first = block * self.groups_per_block
        chosen = np.arange(first, min(first + self.groups_per_block, int(self.group_ends[-1])))
        parts = [self._read(group) for group in (self._order[1][chosen] if self.shuffle else chosen).tolist()]
        ids, weights, lengths = (np.concatenate(values) for values in zip(*parts, strict=True))
        rows = Rows(*pack(ids, weights, lengths, self.sequence_length))
        if not self.shuffle:
            return rows
        order = np.random.default_rng([self.seed, epoch, block]).permutation(len(rows.input_ids))
        return rows.take(order)

    def _read(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat ids, flat weights and sequence lengths of one row group of the set."""
        shard = int(np.searchsorted(self.group_ends, group, side="right"))
        row_group = group - int(self.group_ends[shard]) + self.shards.first.manifest.shards[shard].row_groups
        column = self.weighting.column
        table = self.shards.read(shard, column, row_group)
        lengths = list_lengths(table["input_ids"])
        ids = flat_values(table["input_ids"])
        scores = flat_values(table[column]) if column else np.zeros(len(ids), dtype=np.float16)
        rng = np.random.default_rng([self.seed, shard, row_group])
        return ids, self.weighting(scores, lengths, rng), lengths
