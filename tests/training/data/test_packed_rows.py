"""Batches for other training loops: the trainer's rows, with labels, from where they stopped."""

import copy
import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import LENGTHS
from torch import Tensor
from torch.utils.data import DataLoader

from weighted_mtp.schemas.configs import HeadsConfig, WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data import loader as loader_module
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.data.packed_rows import PackedRows, packed_rows
from weighted_mtp.training.loss.multi_head import weighted_linear_cross_entropy
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting

Batch = dict[str, Tensor]
BY_BATCH = {"formula": "normalise(top(excess_loss, 0.5, by=batch), by=batch)", "control": "shuffled"}


@pytest.fixture
def shards(scored_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """A set of several row groups and blocks."""
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 1)
    return scored_set(LENGTHS)


@pytest.fixture
def rows(shards: ShardSet) -> Callable[..., PackedRows]:
    defaults = {"weights": "rho1-static", "sequence_length": 64, "batch_size": 3, "seed": 7}
    return lambda **changes: packed_rows(shards, **defaults | changes)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for own, batch in zip(found, expected, strict=True):
        assert own.keys() == batch.keys()
        for name, values in batch.items():
            torch.testing.assert_close(own[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("weights", [{"preset": "rho1-static"}, {"preset": "dense", "control": "random"}, BY_BATCH])
def test_they_are_the_rows_and_weights_of_training(
    weights: dict[str, str], shards: ShardSet, rows: Callable[..., PackedRows]
) -> None:
    config = WeightsConfig.model_validate(weights)
    zipped = ZippedSets((shards,))
    loader = RowLoader(zipped, make_weighting(config, zipped), 64, seed=7)
    weighting = BatchWeighting.make(config)
    for step, (own, batch) in enumerate(islice(zip(rows(weights=weights), loader.batches(3), strict=False), 12)):
        weighed = weighting.weigh_rows(batch, 1.0, np.random.default_rng([7, step]))  # as TrainingLoop does
        targets = batch.position_ids > 0
        np.testing.assert_array_equal(own["input_ids"].numpy(), batch.input_ids)
        np.testing.assert_array_equal(own["position_ids"].numpy(), batch.position_ids)
        np.testing.assert_array_equal(own["labels"].numpy(), np.where(targets, batch.input_ids, -100))
        np.testing.assert_array_equal(own["weights"].numpy(), np.where(targets, weighed.weights, 0))
        assert [values.dtype for values in own.values()] == [torch.int64] * 3 + [torch.float32]
        assert {values.shape for values in own.values()} == {(3, 64)}


def test_the_first_token_of_a_document_and_padding_are_no_targets(scored_set: Callable[..., ShardSet]) -> None:
    shards = scored_set([5, 2], shards=1)
    ids = [sequence.input_ids.tolist() for sequence in shards.sequences()]
    batch = next(iter(packed_rows(shards, sequence_length=10, batch_size=1)))
    assert batch["labels"].tolist() == [[-100, *ids[0][1:], -100, ids[1][1], -100, -100, -100]]
    assert batch["weights"].tolist() == [[0, 1, 1, 1, 1, 0, 1, 0, 0, 0]]


def test_single_rows_are_those_of_batches_and_every_iterator_starts_over(rows: Callable[..., PackedRows]) -> None:
    whole = [{name: values[row] for name, values in batch.items()} for batch in islice(rows(), 4) for row in range(3)]
    stream = rows(batch_size=None)
    assert_same(list(islice(stream, 12)), whole)
    assert_same(list(islice(stream, 2)), whole[:2])
    batches = DataLoader(stream, batch_size=3)
    assert_same(list(islice(batches, 4)), list(islice(rows(), 4)))


@pytest.mark.parametrize("consumed", [0, 1, 40])
def test_single_rows_start_at_a_loaded_position(consumed: int, rows: Callable[..., PackedRows]) -> None:
    first, second = rows(batch_size=None), rows(batch_size=None)
    whole = list(islice(rows(batch_size=None), consumed + 5))
    list(islice(first, consumed))
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict() == state
    for _ in range(2):
        assert_same(list(islice(second, 5)), whole[consumed:])


@pytest.mark.parametrize("consumed", [0, 1, 9, 40])
@pytest.mark.parametrize("weights", ["rho1-static", BY_BATCH], ids=["stored", "by batch"])
def test_resumed_equals_uninterrupted(weights: object, consumed: int, rows: Callable[..., PackedRows]) -> None:
    whole = list(islice(rows(weights=weights), 60))  # more than an epoch
    first = rows(weights=weights)
    list(islice(first, consumed))
    state = json.loads(json.dumps(first.state_dict()))
    second = rows(weights=weights)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert_same(list(islice(second, 60 - consumed)), whole[consumed:])
    assert_same(list(islice(first, 60 - consumed)), whole[consumed:])  # a new iterator of the same stream


def test_another_batch_size_continues_at_the_same_row(rows: Callable[..., PackedRows]) -> None:
    whole = torch.cat([batch["input_ids"] for batch in islice(rows(), 8)])
    first, second = rows(), rows(batch_size=5)
    list(islice(first, 3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(second))["input_ids"], whole[9:14])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 8}, "seed"), ({"sequence_length": 32, "seed": 8}, "sequence_length and seed")],
)
def test_a_state_of_another_order_is_refused(
    changes: dict[str, int], named: str, rows: Callable[..., PackedRows]
) -> None:
    with pytest.raises(UserError, match=f"saved with another {named}; use the same"):
        rows(**changes).load_state_dict(rows().state_dict())


def test_a_state_of_another_set_is_refused(
    scored_set: Callable[..., ShardSet], rows: Callable[..., PackedRows]
) -> None:
    other = packed_rows(scored_set(LENGTHS, name="other", seed=1), sequence_length=64, batch_size=3, seed=7)
    with pytest.raises(UserError, match="saved with another input"):
        other.load_state_dict(rows().state_dict())


def test_a_data_loader_gives_the_same_batches(rows: Callable[..., PackedRows]) -> None:
    stream = rows()
    assert_same(list(islice(DataLoader(stream, batch_size=None), 5)), list(islice(rows(), 5)))
    with pytest.raises(UserError, match="every worker of a DataLoader would give the same rows; use num_workers=0"):
        next(iter(DataLoader(stream, batch_size=None, num_workers=2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "rho1"}, "depends on the loss of the model in training"),
        ({"weights": {"preset": "dense", "warmup_ratio": 0.5}}, "warmup_ratio needs the number of steps"),
        ({"sequence_length": 1}, "sequence_length: Input should be greater than or equal to 2"),
        ({"sequence_length": 10**9}, "sequence_length: Input should be less than or equal to 16777216"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"sequence_length": 64.5}, "sequence_length: Input should be a valid integer"),
        ({"batch_size": 0}, "batch_size: Input should be greater than 0"),
        ({"batch_size": 10**9}, "batch_size 1000000000: .* at most 268,435,456 tokens are possible, so give at most"),
        ({"batch_size": None, "weights": BY_BATCH}, "ranks tokens within a batch; give batch_size, or use by=corpus"),
        ({"weights": {"column": "loss_b", "preset": "dense"}}, "no column 'loss_b'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], message: str, rows: Callable[..., PackedRows]) -> None:
    with pytest.raises(UserError, match=message):
        rows(**changes)


def test_a_shifted_loss_is_that_of_the_trainer(rows: Callable[..., PackedRows], model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1,)), from_scratch=False)
    batch = next(iter(rows()))
    total, _ = model(batch["input_ids"], batch["position_ids"], batch["weights"])
    total.backward()
    expected = {name: parameter.grad for name, parameter in model.trunk.named_parameters()}
    model.zero_grad(set_to_none=True)
    states = model.trunk.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
    kept = weights != 0
    own, _ = weighted_linear_cross_entropy(
        states[:, :-1][kept], model.trunk.lm_head.weight, labels[kept], weights[kept]
    )
    own.backward()
    torch.testing.assert_close(own, total)
    for name, parameter in model.trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_sizes_are_whole_numbers_of_any_type(rows: Callable[..., PackedRows]) -> None:
    own = rows(sequence_length=64.0, batch_size=np.int64(3), seed=np.uint8(7))
    assert_same(list(islice(own, 3)), list(islice(rows(), 3)))
    assert own.state_dict() == json.loads(json.dumps(own.state_dict()))


def test_a_copy_continues_like_the_stream(rows: Callable[..., PackedRows]) -> None:
    stream = rows(weights=BY_BATCH)
    list(islice(stream, 9))
    copies = [copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))]
    following = list(islice(stream, 20))
    for own in copies:
        assert_same(list(islice(own, 20)), following)


@pytest.mark.parametrize("position", [{"block": 99}, {"row": 10**9}, {"epoch": 10**30, "row": 10**30}])
def test_a_position_beyond_the_set_is_refused(position: dict[str, int], rows: Callable[..., PackedRows]) -> None:
    stream = rows()
    stream.load_state_dict(stream.state_dict() | {"rows": position})
    with pytest.raises(UserError, match=r"has no row .* of block .*; give a position in this set"):
        next(iter(stream))


def test_no_sets_are_refused() -> None:
    with pytest.raises(UserError, match="no shard set is given; give at least one"):
        packed_rows([], sequence_length=64)


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"order": {}, "rows": {"epoch": "x"}, "batches": 0},
        {"order": 1},
        {"order": {}, "rows": {}, "batches": -1},
        {"order": {}, "rows": {"epoch": -1}, "batches": 0},
        {"order": {}, "rows": {}, "batches": 0.5},
    ],
)
def test_what_is_no_state_is_refused(state: object, rows: Callable[..., PackedRows]) -> None:
    with pytest.raises(UserError, match="not a state of packed_rows"):
        rows().load_state_dict(state)
