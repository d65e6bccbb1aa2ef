"""The rows of an evaluation: the first tokens of a shard set, packed in stored order."""

from collections.abc import Iterator

import numpy as np

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data.loader import block_tokens, check_targets
from weighted_mtp.training.data.packing import pack
from weighted_mtp.training.rows import Rows


class HeldOutRows:
    """Packed rows of weight 1, determined by the set, the number of tokens and the row length alone.

    `Rows.sources` are documents, numbered from 0 in stored order.

    Attributes:
        documents: number of documents read so far.

    Args:
        shards: the set to read.
        sequence_length: tokens per packed row.
        max_tokens: read this many tokens from the start of the set, and cut the last document there; None reads all.

    Raises:
        UserError: the set has nothing to predict.
    """

    def __init__(self, shards: ShardSet, sequence_length: int, max_tokens: int | None = None) -> None:
        check_targets(shards)
        self.shards = shards
        self.sequence_length = sequence_length
        self.tokens = min(shards.manifest.tokens, max_tokens or shards.manifest.tokens)
        self.documents = 0

    def batches(self, rows: int) -> Iterator[Rows]:
        """Yield all rows once, in batches of at most `rows` rows."""
        held: list[np.ndarray] = []
        documents: list[int] = []
        tokens = 0
        for ids in self._sequences():
            held.append(ids)
            documents.append(self.documents - 1)
            tokens += len(ids)
            if tokens >= block_tokens(self.sequence_length):
                yield from self._packed(held, documents, rows)
                held, documents, tokens = [], [], 0
        if held:
            yield from self._packed(held, documents, rows)

    def _sequences(self) -> Iterator[np.ndarray]:
        """Yield the ids (T,) of each sequence, and count its document."""
        left, last = self.tokens, None
        for sequence in self.shards.sequences([]):
            if sequence.start == 0 or sequence.document_id != last:
                self.documents += 1
            last = sequence.document_id
            yield sequence.input_ids[:left]
            left -= len(sequence.input_ids)
            if left <= 0:
                return

    def _packed(self, held: list[np.ndarray], documents: list[int], rows: int) -> Iterator[Rows]:
        """Pack the sequences of one block."""
        ids, lengths = np.concatenate(held), np.array([len(one) for one in held])
        block = pack(ids, np.ones(len(ids), np.float32), lengths, np.array(documents), self.sequence_length)
        for first in range(0, len(block.tokens), rows):
            yield block.take(slice(first, first + rows))
