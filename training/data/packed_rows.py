"""Training batches for any training loop, as torch tensors."""

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from weighted_mtp.schemas.configs.common import Positive, RowLength, Seed
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.zipped import SomeSets, ZippedSets
from weighted_mtp.training.data.loader import LoaderState, RowLoader, check_batch
from weighted_mtp.training.rows import IGNORED, Rows
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting
from weighted_mtp.training.weighting.token_weights import SomeWeights, choose_weights


class PackedRowsConfig(BaseModel):
    """Bounds of the arguments of `packed_rows`, those of `wmtp train`."""

    sequence_length: RowLength
    batch_size: Positive | None
    seed: Seed


class PackedRowsState(BaseModel):
    """What `PackedRows.state_dict` returns."""

    rows: LoaderState
    batches: Annotated[int, Field(ge=0)]
    order: dict[str, Any]


class PackedRows(IterableDataset[dict[str, Tensor]]):
    """An endless, resumable stream of batches or single rows; see `packed_rows`.

    A stream of batches continues after the last batch received, also with a new iterator. Every iterator over single
    rows starts at the first row, or at the position loaded with `load_state_dict`: a `DataLoader` that skips the rows
    of finished steps expects this. A thread prepares rows ahead, so that a DataLoader needs no workers.
    """

    def __init__(self, loader: RowLoader, weighting: BatchWeighting, batch_size: int | None) -> None:
        self.loader = loader
        self.weighting = weighting
        self.batch_size = batch_size
        self.batches = 0
        self.start = loader.state

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UserError("packed_rows: every worker of a DataLoader would give the same rows; use num_workers=0")
        if self.batch_size is None:
            self.loader.state = self.start
        for rows in self.loader.batches(self.batch_size or 1):
            rng = np.random.default_rng([self.loader.seed, self.batches])  # as in training
            self.batches += 1
            batch = to_tensors(self.weighting.weigh_rows(rows, 1.0, rng))
            yield batch if self.batch_size else {name: values[0] for name, values in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch or row received, as plain values."""
        return {"rows": self.loader.state.model_dump(), "batches": self.batches, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, with the next iterator. The batch size and the weights may differ.

        Raises:
            UserError: the position belongs to other sets, another sequence length or another seed, or is none.
        """
        try:
            given = PackedRowsState.model_validate(state)
        except ValidationError as error:
            raise UserError(
                f"packed_rows: not a state of packed_rows ({first_line(error)}); give what state_dict() returned"
            ) from error
        if changed := [name for name, value in self._order().items() if given.order.get(name) != value]:
            raise UserError(f"packed_rows: the state was saved with another {' and '.join(changed)}; use the same")
        self.start = self.loader.state = given.rows
        self.batches = given.batches

    def _order(self) -> dict[str, Any]:
        """What determines the order of the rows."""
        loader = self.loader
        return {"input": loader.shards.digest, "sequence_length": loader.sequence_length, "seed": loader.seed}


def packed_rows(
    sets: SomeSets,
    *,
    weights: SomeWeights = "uniform",
    sequence_length: int,
    batch_size: int | None = None,
    seed: int = 0,
) -> PackedRows:
    """Endless stream of training batches or rows: the rows of `wmtp train`, in the same order.

    Each batch is a dict of tensors (B, L), and each row one of tensors (L,):

    * `input_ids`, int64, 0 in padding;
    * `position_ids`, int64, restarting at 0 in every document; each padding token is a document of its own;
    * `labels`, int64, not shifted: `labels[t]` is `input_ids[t]`, and -100 where token t is no target, which is at the
      first token of every document and in padding;
    * `weights`, float32: `weights[t]` belongs to `labels[t]`, and is 0 where that is -100.

    Args:
        sets: a shard set, or several with the same rows.
        weights: the scheme. Functions by batch take each batch for one optimizer step.
        sequence_length: L, tokens per row, at least 2. Longer sequences are cut into several documents.
        batch_size: B, rows per batch; None for single rows, which a DataLoader or `Trainer` batches.
        seed: seed of the order and of random controls.

    Raises:
        UserError: the sets cannot be opened, lack a column or have nothing to predict, a size is too small or too
            large, or the weights need a model, a run or, for single rows, a batch.
    """
    config = choose_weights(weights)
    try:
        sizes = PackedRowsConfig(sequence_length=sequence_length, batch_size=batch_size, seed=seed)
    except ValidationError as error:
        raise UserError(f"packed_rows: {first_line(error)}") from error
    check_batch(sizes.batch_size or 1, sizes.sequence_length, "packed_rows: batch_size")
    weighting = BatchWeighting.make(config)
    if sizes.batch_size is None and weighting.formula is not None:
        raise UserError(f"packed_rows: '{config.text}' ranks tokens within a batch; give batch_size, or use by=corpus")
    shards = ZippedSets.of(sets)
    loader = RowLoader(shards, make_weighting(config, shards), sizes.sequence_length, seed=sizes.seed)
    return PackedRows(loader, weighting, sizes.batch_size)


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """A batch as in `packed_rows`, from rows with one weight per token."""
    ids, positions, weights = map(torch.from_numpy, rows[:3])
    input_ids, first = ids.long(), positions == 0
    return {
        "input_ids": input_ids,
        "position_ids": positions.long(),
        "labels": input_ids.masked_fill(first, IGNORED),
        "weights": weights.masked_fill(first, 0.0),
    }
