"""Evaluation: held-out loss and accuracy of every prediction."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.model.head_sums import HeadSums
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.sharding import reshard
from weighted_mtp.training.weighting import make_weighting


class HeadLoss(NamedTuple):
    """Mean loss (nats per target) and top-1 accuracy of one of `HeadsConfig.predictions`, over `targets` tokens."""

    prediction: str
    loss: float
    accuracy: float
    targets: int


def to_device(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids` (B, T) int64, `position_ids` (B, T) int64, and `weights` (B, T) or (B, T, components) float32."""
    ids, positions, weights = (torch.from_numpy(values).to(device, non_blocking=True) for values in rows[:3])
    return ids.long(), positions.long(), weights


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    shards: ZippedSets,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    progress: MakeBar = hidden_bar,
) -> list[HeadLoss]:
    """Unweighted losses of every prediction over a held-out set; each valid target counts once.

    All processes share the work. Evaluation stops at the row that reaches `max_tokens` tokens, so that the result does
    not depend on the batch size. `progress` makes the bar of tokens.
    """
    unwrapped: MTPModel = accelerator.unwrap_model(model)
    loader = RowLoader(shards, make_weighting(WeightsConfig(), shards), sequence_length, shuffle=False)
    predictions = unwrapped.heads_config.predictions
    totals = HeadSums.zeros(len(predictions), accelerator.device, torch.float64)
    was_training = model.training
    model.eval()
    bar = progress(
        total=min(shards.first.manifest.tokens, max_tokens or shards.first.manifest.tokens),
        desc="evaluate",
        unit="tokens",
        unit_scale=True,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    batches = _limited(loader.once(batch_size), max_tokens)
    with bar:
        for rows, tokens in _distributed(batches, accelerator.num_processes, accelerator.process_index):
            with accelerator.autocast():
                _, sums = unwrapped(*to_device(rows, accelerator.device))
            for total, value in zip(totals, sums, strict=True):
                total += value
            bar.update(tokens)
    reshard(unwrapped)
    model.train(was_training)
    totals = HeadSums(*(accelerator.reduce(total, "sum") for total in totals))
    columns = (totals.plain_loss.tolist(), totals.correct.tolist(), totals.selected.tolist())
    return [
        HeadLoss(prediction, loss / (count or math.nan), correct / (count or math.nan), int(count))
        for prediction, loss, correct, count in zip(predictions, *columns, strict=True)
    ]


def _limited(batches: Iterator[Rows], max_tokens: int | None) -> Iterator[Rows]:
    """Yield as many rows as have `max_tokens` tokens together, whatever the size of the batches."""
    seen = 0
    for rows in batches:
        before = seen + np.cumsum(rows.tokens) - rows.tokens
        wanted = len(before) if max_tokens is None else int(np.searchsorted(before, max_tokens))
        if wanted:
            yield rows.take(slice(wanted))
        if wanted < len(before):
            return
        seen += int(rows.tokens.sum())


def _distributed(batches: Iterator[Rows], processes: int, index: int) -> Iterator[tuple[Rows, int]]:
    """Yield every `processes`-th batch, starting at `index`, with the number of tokens in all batches of its round.

    If the last round is short, the remaining processes get a batch of weight 0: all must run a sharded model.
    """
    while group := list(islice(batches, processes)):
        mine = group[index] if index < len(group) else group[0]._replace(weights=np.zeros_like(group[0].weights))
        yield mine, sum(int(rows.tokens.sum()) for rows in group)
