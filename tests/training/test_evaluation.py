"""Held-out losses against a plain loop, and how batches are limited and shared."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.evaluation import _distributed, _limited, evaluate_model, to_device
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.rows import Rows


def rows(tokens: int) -> Rows:
    """One row of four tokens, the last ones padding."""
    values = np.arange(4)[None]
    ids, positions = values.astype(np.int32), np.where(values < tokens, values, 0).astype(np.int32)
    weights, nothing = np.ones((1, 4), np.float32), np.array([0])
    return Rows(ids, positions, weights, np.array([tokens]), nothing, np.empty(1, object))


def test_losses_of_every_prediction_equal_a_plain_loop(
    model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> None:
    """A sequence of one token, rows of 64 with padding, and a model in training, with dropout."""
    shards = scored_set([40, 1, 30, 20], shards=2)
    model = build_model(str(model_dir("gpt2-dropout")), HeadsConfig(offsets=(1, 3)), from_scratch=False).eval()
    documents = [torch.tensor(ids) for number in (0, 1) for ids in shards.read(number)["input_ids"].to_pylist()]
    losses: dict[int, list[float]] = {1: [], 3: []}
    right: dict[int, list[bool]] = {1: [], 3: []}
    with torch.no_grad():  # residual heads start as the trunk's own prediction, of later tokens
        for ids in documents:
            log_p = model.trunk(ids[None]).logits[0].log_softmax(-1)
            for offset in losses:
                for t in range(len(ids) - offset):
                    losses[offset].append(-log_p[t, ids[t + offset]].item())
                    right[offset].append(log_p[t].argmax().item() == ids[t + offset].item())
    model.train()
    found = evaluate_model(Accelerator(cpu=True), model, ZippedSets((shards,)), sequence_length=64, batch_size=2)
    assert [head.prediction for head in found] == ["1", "3"]
    for head, offset in zip(found, (1, 3), strict=True):
        assert head.targets == len(losses[offset]) == 40 + 30 + 20 - 3 * offset
        assert head.loss == pytest.approx(np.mean(losses[offset]), rel=1e-5)
        assert head.accuracy == pytest.approx(np.mean(right[offset]))
    assert model.training, "the mode is as it was"


def test_a_prediction_without_targets_has_no_loss(
    model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 5)), from_scratch=False)
    shards = ZippedSets((scored_set([4, 4]),))
    near, far = evaluate_model(Accelerator(cpu=True), model, shards, sequence_length=8, batch_size=2)
    assert near.targets == 6
    assert far.targets == 0
    assert math.isnan(far.loss)
    assert math.isnan(far.accuracy)


def test_batches_until_there_are_enough_tokens() -> None:
    batches = [rows(3), rows(2), rows(4)]
    assert len(list(_limited(iter(batches), None))) == 3
    assert [batch.tokens.item() for batch in _limited(iter(batches), 4)] == [3, 2]
    assert [batch.tokens.item() for batch in _limited(iter(batches), 3)] == [3]


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 7])
def test_the_limit_does_not_depend_on_the_batch_size(batch: int) -> None:
    every = [rows(tokens) for tokens in (4, 3, 4, 2, 4, 1)]
    batches = [Rows.concatenate(every[first : first + batch]) for first in range(0, 6, batch)]
    for limit, count in ((1, 1), (4, 1), (5, 2), (12, 4), (18, 6), (99, 6)):
        found = [tokens for part in _limited(iter(batches), limit) for tokens in part.tokens]
        assert found == [4, 3, 4, 2, 4, 1][:count]


def test_processes_share_the_batches_and_a_short_round_is_filled_without_weight() -> None:
    batches = [rows(3), rows(2), rows(4)]
    first, second = (list(_distributed(iter(batches), 2, index)) for index in (0, 1))
    assert [(mine.tokens.item(), tokens) for mine, tokens in first] == [(3, 5), (4, 4)]
    assert [tokens for _, tokens in second] == [5, 4]
    assert second[0][0].tokens.item() == 2
    assert first[1][0].weights.all()
    assert not second[1][0].weights.any()
    assert batches[2].weights.all(), "the batch of the other process is untouched"


def test_tensors_of_a_batch() -> None:
    ids, positions, weights = to_device(rows(3), torch.device("cpu"))
    assert (ids.dtype, positions.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (ids.tolist(), positions.tolist()) == ([[0, 1, 2, 3]], [[0, 1, 2, 0]])
