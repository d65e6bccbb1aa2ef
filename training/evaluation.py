"""Evaluation: held-out loss and accuracy of every prediction."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data.held_out import HeldOutRows
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.sharding import reshard


class HeadLoss(NamedTuple):
    """Results of one of `HeadsConfig.predictions` on a held-out set; means over no targets are NaN.

    Attributes:
        prediction: its name.
        loss: mean loss, nats per target.
        accuracy: share of the targets that are the most likely token.
        targets: number of targets.
        documents: number of documents with a target.
        standard_error: of the loss, nats, as in `standard_error`.
    """

    prediction: str
    loss: float
    accuracy: float
    targets: int
    documents: int
    standard_error: float


def to_device(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids` (B, T) int64, `position_ids` (B, T) int64, and `weights` (B, T) or (B, T, components) float32."""
    ids, positions, weights = (torch.from_numpy(values).to(device, non_blocking=True) for values in rows[:3])
    return ids.long(), positions.long(), weights


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    shards: ShardSet,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    progress: MakeBar = hidden_bar,
) -> list[HeadLoss]:
    """Unweighted losses of every prediction over a held-out set; each valid target counts once.

    The targets are those of the first `max_tokens` tokens of the set in rows of `sequence_length` tokens, for any batch
    size and number of processes. All processes share the work. `progress` makes the bar of tokens.

    Raises:
        UserError: the set has nothing to predict, or a shard is damaged.
    """
    unwrapped: MTPModel = accelerator.unwrap_model(model)
    held_out = HeldOutRows(shards, sequence_length, max_tokens)
    predictions = unwrapped.heads_config.predictions
    documents: list[np.ndarray] = []
    sums: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    bar = progress(
        total=held_out.tokens,
        desc="evaluate",
        unit="tokens",
        unit_scale=True,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    with bar:
        batches = held_out.batches(batch_size)
        for rows, tokens in _distributed(batches, accelerator.num_processes, accelerator.process_index):
            with accelerator.autocast():
                _, found = unwrapped(*to_device(rows, accelerator.device), by_document=True)
            row, column = np.nonzero(rows.position_ids == 0)
            values = torch.stack([found.plain_loss, found.correct, found.selected])  # (3, P, N)
            sums.append(values.cpu().numpy()[..., column < rows.tokens[row]])  # without padding
            documents.append(np.concatenate(rows.sources))
            bar.update(tokens)
    reshard(unwrapped)
    model.train(was_training)
    totals = torch.zeros(3, len(predictions), held_out.documents, dtype=torch.float64)
    totals.index_add_(-1, torch.from_numpy(np.concatenate(documents)), torch.from_numpy(np.concatenate(sums, -1)))
    totals = accelerator.reduce(totals.to(accelerator.device), "sum").cpu()
    return [_head_loss(prediction, *totals[:, head].numpy()) for head, prediction in enumerate(predictions)]


def _head_loss(prediction: str, losses: np.ndarray, correct: np.ndarray, targets: np.ndarray) -> HeadLoss:
    """Results from sums (D,) of each document."""
    count = targets.sum()
    return HeadLoss(
        prediction,
        loss=float(losses.sum() / (count or math.nan)),
        accuracy=float(correct.sum() / (count or math.nan)),
        targets=int(count),
        documents=int(np.count_nonzero(targets)),
        standard_error=standard_error(losses, targets),
    )


def standard_error(losses: np.ndarray, targets: np.ndarray) -> float:
    """Standard error of the mean loss of a target, if documents are independent samples and their targets are not.

    With the mean loss m, and G documents d with losses of sum L_d over n_d > 0 targets, it is

        sqrt(G / (G - 1) * sum over d of (L_d - m n_d)^2) / sum over d of n_d

    These are the clustered standard errors of arXiv 2411.00640, with the factor G / (G - 1) of the ratio estimator
    (Cochran, Sampling Techniques, 1977, section 2.11).

    Args:
        losses: (D,) sum of each document, nats.
        targets: (D,) number of targets of each document; documents without targets do not count.

    Returns:
        Nats; NaN for fewer than two documents.
    """
    documents = np.count_nonzero(targets)
    if documents < 2:
        return math.nan
    with np.errstate(invalid="ignore"):  # infinite losses
        residuals = losses - losses.sum() / targets.sum() * targets
    return float(np.sqrt(documents / (documents - 1) * (residuals @ residuals)) / targets.sum())


def _distributed(batches: Iterator[Rows], processes: int, index: int) -> Iterator[tuple[Rows, int]]:
    """Yield every `processes`-th batch, starting at `index`, with the number of tokens in all batches of its round.

    If the last round is short, the remaining processes get a batch of weight 0: all must run a sharded model.
    """
    while group := list(islice(batches, processes)):
        mine = group[index] if index < len(group) else group[0]._replace(weights=np.zeros_like(group[0].weights))
        yield mine, sum(int(rows.tokens.sum()) for rows in group)
