"""Held-out losses and their standard errors against a plain loop, and how processes share the batches."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data import loader as loader_module
from weighted_mtp.training.evaluation import HeadLoss, _distributed, evaluate_model, standard_error, to_device
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.rows import Rows


def rows(tokens: int) -> Rows:
    """One row of four tokens, the last ones padding."""
    values = np.arange(4)[None]
    ids, positions = values.astype(np.int32), np.where(values < tokens, values, 0).astype(np.int32)
    weights, nothing = np.ones((1, 4), np.float32), np.array([0])
    return Rows(ids, positions, weights, np.array([tokens]), nothing, np.empty(1, object))


def clustered(losses: list[list[float]]) -> float:
    """Standard error of the mean loss, from the deviations of all targets of each document."""
    mean = np.mean(np.concatenate(losses))
    sums = [sum(loss - mean for loss in document) for document in losses if document]
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(total**2 for total in sums)) / sum(map(len, losses))


def test_losses_of_every_prediction_equal_a_plain_loop(
    model_dir: Callable[..., Path], make_shard_set: Callable[..., ShardSet]
) -> None:
    """A document of one token, one of two sequences, rows of 64 with padding, and a model in training, with dropout."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, length).tolist() for length in (40, 1, 30, 20, 64, 9)]
    documents = [0, 1, 2, 3, 4, 4]
    shards = make_shard_set(
        sequences, document_ids=[str(document) for document in documents], document_starts=[0, 0, 0, 0, 0, 64]
    )
    model = build_model(str(model_dir("gpt2-dropout")), HeadsConfig(offsets=(1, 3)), from_scratch=False).eval()
    losses: dict[int, list[list[float]]] = {offset: [[] for _ in range(5)] for offset in (1, 3)}
    right: dict[int, list[bool]] = {1: [], 3: []}
    with torch.no_grad():  # residual heads start as the trunk's own prediction, of later tokens
        for document, ids in zip(documents, map(torch.tensor, sequences), strict=True):
            log_p = model.trunk(ids[None]).logits[0].log_softmax(-1)
            for offset in losses:
                for t in range(len(ids) - offset):
                    losses[offset][document].append(-log_p[t, ids[t + offset]].item())
                    right[offset].append(log_p[t].argmax().item() == ids[t + offset].item())
    model.train()
    found = evaluate_model(Accelerator(cpu=True), model, shards, sequence_length=64, batch_size=2)
    assert [head.prediction for head in found] == ["1", "3"]
    for head, offset in zip(found, (1, 3), strict=True):
        assert head.targets == 40 + 30 + 20 + 64 + 9 - 5 * offset
        assert head.documents == 4
        assert head.loss == pytest.approx(np.mean(np.concatenate(losses[offset])), rel=1e-5)
        assert head.accuracy == pytest.approx(np.mean(right[offset]))
        assert head.standard_error == pytest.approx(clustered(losses[offset]), rel=1e-4)
    assert model.training, "the mode is as it was"


def test_results_depend_on_the_set_the_length_and_the_limit_alone(
    model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed in several blocks. The first 157 tokens are documents of 90, 50 and 7 tokens and 10 of the fourth.

    Rows of 32 cut them into 3, 2, 1 and 1 pieces, each with one token that is no target.
    """
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 1)
    shards = scored_set([90, 50, 7, 33, 80])
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)

    def evaluated(batch_size: int, sequence_length: int, limit: int | None) -> list[HeadLoss]:
        return evaluate_model(
            Accelerator(cpu=True),
            model,
            shards,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=limit,
        )

    for length, limit, targets in ((32, 157, 157 - 7), (90, 157, 157 - 4), (90, None, 260 - 5)):
        one, *others = (evaluated(size, length, limit)[0] for size in (1, 2, 8))
        assert one.targets == targets
        assert one.documents == (4 if limit else 5)
        for other in others:
            assert other[3:5] == one[3:5]
            assert other[1:3] + other[5:] == pytest.approx(one[1:3] + one[5:], rel=1e-5)


def test_standard_errors_by_hand() -> None:
    """The mean is 12 / 6 = 2. Documents of 2 and 4 targets deviate from it by 6 - 4 = 2 and 6 - 8 = -2 in total."""
    assert standard_error(np.array([6.0, 6.0]), np.array([2.0, 4.0])) == pytest.approx(math.sqrt(2 / 1 * (4 + 4)) / 6)
    with_empty = standard_error(np.array([6.0, 0.0, 6.0]), np.array([2.0, 0.0, 4.0]))
    assert with_empty == standard_error(np.array([6.0, 6.0]), np.array([2.0, 4.0]))
    assert standard_error(np.array([4.0, 8.0]), np.array([2.0, 4.0])) == 0


def test_documents_of_equal_length_have_the_standard_error_of_their_means() -> None:
    means = np.random.default_rng(0).normal(3, 1, 50)
    assert standard_error(means * 7, np.full(50, 7.0)) == pytest.approx(means.std(ddof=1) / math.sqrt(50))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "targets"), [([], []), ([6.0], [2.0]), ([6.0, 0.0], [2.0, 0.0]), ([6.0, math.inf], [2.0, 2.0])]
)
def test_no_standard_error_of_one_document_or_of_infinite_losses(losses: list[float], targets: list[float]) -> None:
    assert math.isnan(standard_error(np.array(losses), np.array(targets)))


def test_a_prediction_without_targets_has_no_loss(
    model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 5)), from_scratch=False)
    near, far = evaluate_model(Accelerator(cpu=True), model, scored_set([4, 4]), sequence_length=8, batch_size=2)
    assert near.targets == 6
    assert (far.targets, far.documents) == (0, 0)
    assert all(map(math.isnan, (far.loss, far.accuracy, far.standard_error)))


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
