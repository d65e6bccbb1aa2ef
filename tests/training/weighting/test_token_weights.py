"""Weights outside a run are those that the loader gives to the same sequences."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from comparing import LENGTHS

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.weighting import make_weighting
from weighted_mtp.training.weighting.token_weights import token_weights

ROW = 128


@pytest.fixture
def sets(make_shard_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> list[ShardSet]:
    """Two sets with the same rows in many row groups, with one column each."""
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 300)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    columns = {name: [[np.nan, *rng.normal(size=n - 1)] for n in LENGTHS] for name in ("excess_loss", "long_short")}
    return [make_shard_set(sequences, {name: columns[name]}, name, 20) for name in columns]


def of_loader(sets: list[ShardSet], config: WeightsConfig, seed: int) -> dict[bytes, np.ndarray]:
    """Weights of all sequences of at least two tokens, by their token ids."""
    shards = ZippedSets(tuple(sets))
    found = {}
    for rows in RowLoader(shards, make_weighting(config, shards), ROW, seed=seed).batches(4):
        starts = np.flatnonzero(rows.position_ids.ravel() == 0)
        for first, end in zip(starts, [*starts[1:], rows.position_ids.size], strict=True):
            if end - first > 1:
                found[rows.input_ids.ravel()[first:end].tobytes()] = rows.weights.ravel()[first:end]
        if len(found) == sum(length > 1 for length in LENGTHS):
            return found
    raise AssertionError


@pytest.mark.parametrize(
    "weights",
    [
        "uniform",
        "rho1-static",
        {"preset": "dense", "lam": 0.25},
        {"preset": "rho1-static", "control": "shuffled"},
        WeightsConfig(formula="normalise(relu(excess_loss - 0.5 * long_short), by=corpus)"),
        WeightsConfig(formula="top(exp(-3 * long_short), 0.3, by=sequence) + rank(1e5 * excess_loss, by=sequence)"),
    ],
    ids=str,
)
def test_they_are_those_of_the_loader(weights: Any, sets: list[ShardSet]) -> None:
    config = weights if isinstance(weights, WeightsConfig) else None
    config = config or WeightsConfig.model_validate({"preset": weights} if isinstance(weights, str) else weights)
    expected = of_loader(sets, config, seed=3)
    found: Iterator[np.ndarray] = token_weights([str(sets[0].path), sets[1]], weights, seed=3)
    matched = 0
    for sequence, own in zip(sets[0].sequences([]), found, strict=True):
        assert (own.dtype, own.shape) == (np.float32, sequence.input_ids.shape)
        if len(own) > 1:
            np.testing.assert_array_equal(own, expected[sequence.input_ids.tobytes()])
            matched += 1
    assert matched == len(expected)


def test_one_set_may_come_without_a_list(sets: list[ShardSet]) -> None:
    for one in (sets[0], sets[0].path, str(sets[0].path)):
        assert len(list(token_weights(one, "rho1-static"))) == len(LENGTHS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("rho1", r"weights: '.*live.*' depends on the loss of the model in training; use stored columns, or train\(\)"),
        ({"preset": "dense", "live": True}, "depends on the loss of the model in training"),
        ({"formula": "top(excess_loss, 0.5, by=batch)"}, "ranks tokens within a batch; use packed_rows, or by=corpus"),
        ({"preset": "dense", "warmup_ratio": 0.1}, "warmup_ratio needs the number of steps of a run; leave it out"),
        ("rho", "weights: no preset 'rho'; choose from uniform, rho1, .*, or give a formula as {'formula': '...'}"),
        ("top(excess_loss, 0.5)\n", r"weights: no preset 'top\(excess_loss, 0.5\)\\n'; .*{'formula': '...'}"),
        ({"formula": "top(excess_loss"}, r"weights: .*formula"),
        ({"formula": "loss_reference"}, "no column 'loss_reference'"),
    ],
)
def test_what_needs_a_run_or_is_wrong_is_refused_in_one_line(weights: Any, message: str, sets: list[ShardSet]) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        token_weights(sets, weights)
    assert "\n" not in str(refusal.value)


def test_a_list_of_no_sets_and_a_seed_that_is_none_are_refused(sets: list[ShardSet]) -> None:
    with pytest.raises(UserError, match="no shard set is given; give at least one"):
        token_weights([])
    with pytest.raises(UserError, match="seed: Input should be greater than or equal to 0"):
        token_weights(sets, seed=-1)
