"""Held-out loss of every head."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.model.mtp_model import HEAD_SUMS, MTPModel
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.sharding import reshard
from weighted_mtp.training.weighting import make_weighting


class HeadLoss(NamedTuple):
    """Mean loss (nats per target) and top-1 accuracy of one of `HeadsConfig.parts` over `targets` held-out tokens."""

    part: str
    loss: float
    accuracy: float
    targets: int


def to_device(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids` int64, `position_ids` int64 and `weights` float32, (B, T) or (B, T, parts)."""
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
) -> list[HeadLoss]:
    """Plain losses of every head over a held-out set, every valid target counted once.

    All processes share the work; `max_tokens` stops after that many tokens.
    """
    unwrapped: MTPModel = accelerator.unwrap_model(model)
    loader = RowLoader(shards, make_weighting(WeightsConfig(), shards), sequence_length, shuffle=False)
    sums = torch.zeros(len(unwrapped.config.parts), len(HEAD_SUMS), device=accelerator.device, dtype=torch.float64)
    was_training = model.training
    model.eval()
    bar = ProgressBar(
        total=min(shards.first.manifest.tokens, max_tokens or shards.first.manifest.tokens),
        desc="evaluate",
        unit="token",
        unit_scale=True,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    batches = _limited(loader.once(batch_size), max_tokens)
    with bar:
        for rows, tokens in _dealt(batches, accelerator.num_processes, accelerator.process_index):
            with accelerator.autocast():
                sums += unwrapped(*to_device(rows, accelerator.device))[1]
            bar.update(tokens)
    reshard(unwrapped)
    model.train(was_training)
    totals = accelerator.reduce(sums, "sum").tolist()
    return [
        HeadLoss(part, plain / count, correct / count, int(count)) if count else HeadLoss(part, math.nan, math.nan, 0)
        for part, (_, plain, count, correct, *_) in zip(unwrapped.config.parts, totals, strict=True)
    ]


def _limited(batches: Iterator[Rows], max_tokens: int | None) -> Iterator[Rows]:
    """Batches until they have `max_tokens` tokens."""
    seen = 0
    for rows in batches:
        if max_tokens is not None and seen >= max_tokens:
            return
        seen += int(rows.tokens.sum())
        yield rows


def _dealt(batches: Iterator[Rows], processes: int, index: int) -> Iterator[tuple[Rows, int]]:
    """Deal batches out: of every round, the batch of process `index` and the tokens of all.

    Where the last round is short, a process gets one without weight: if the model is sharded, all must run it.
    """
    while hand := list(islice(batches, processes)):
        mine = hand[index] if index < len(hand) else hand[0]._replace(weights=np.zeros_like(hand[0].weights))
        yield mine, sum(int(rows.tokens.sum()) for rows in hand)
