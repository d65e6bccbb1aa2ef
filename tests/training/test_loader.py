"""The loader's stream: complete, deterministic, and resumable at every row."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from schemas.configs import WeightsConfig
from schemas.errors import UserError
from schemas.shard_set import ShardSet
from schemas.shards import flat_values
from schemas.zipped import ZippedSets
from training import loader as loader_module
from training.loader import LoaderState, RowLoader, Rows
from training.weights import make_weighting

LENGTHS = np.random.default_rng(0).integers(1, 90, 150).tolist()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small set have several row groups and blocks."""
    monkeypatch.setattr("schemas.shards.ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(loader_module, "ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 1)


@pytest.fixture
def rows(scored_set: Callable[..., ShardSet], small_blocks: None) -> Callable[..., RowLoader]:
    """`rows(preset)` makes a loader over several small row groups and blocks."""
    shards = ZippedSets((scored_set(LENGTHS, shards=3),))
    assert sum(shard.row_groups for shard in shards.first.manifest.shards) > 10

    def build(preset: str = "uniform", **kwargs: object) -> RowLoader:
        return RowLoader(shards, make_weighting(WeightsConfig(preset=preset), shards), 64, **kwargs)

    return build


def tokens(parts: list[Rows]) -> list[int]:
    ids = np.concatenate([part.input_ids for part in parts])
    positions = np.concatenate([part.position_ids for part in parts])
    # Padding repeats position 0 at the end of a row; a real token at position 0 is only ever followed by position 1
    # or another document, so count documents by their weight instead: uniform weights are 1 on real tokens.
    weights = np.concatenate([part.weights for part in parts])
    assert not positions[weights == 0].any()
    return sorted(ids[weights > 0].tolist())


def test_an_epoch_holds_every_token_once(rows: Callable[..., RowLoader]) -> None:
    loader = rows(shuffle=False)
    expected = [flat_values(loader.shards.first.read(i)["input_ids"]) for i in range(3)]
    assert tokens(list(loader.once(8))) == sorted(np.concatenate(expected).tolist())


def test_epochs_hold_the_same_tokens_in_another_order(rows: Callable[..., RowLoader]) -> None:
    loader = rows(seed=3)
    epochs: dict[int, list[Rows]] = {0: [], 1: []}
    for batch in loader.batches(1):
        # A batch of one row never spans two blocks, so the state tells its epoch.
        if loader.state.epoch > 1:
            break
        epochs[loader.state.epoch].append(batch)
    assert tokens(epochs[0]) == tokens(epochs[1])
    assert any((a.input_ids != b.input_ids).any() for a, b in zip(epochs[0], epochs[1], strict=False))


def test_order_does_not_depend_on_the_batch_size(rows: Callable[..., RowLoader]) -> None:
    by_one = np.concatenate([b.input_ids for b in islice(rows().batches(1), 60)])
    by_six = np.concatenate([b.input_ids for b in islice(rows().batches(6), 10)])
    np.testing.assert_array_equal(by_one, by_six)
    other_seed = np.concatenate([b.input_ids for b in islice(rows(seed=1).batches(6), 10)])
    assert (by_six != other_seed).any()


@pytest.mark.parametrize("consumed", [1, 2, 7, 30])
def test_resume_continues_with_the_next_row(rows: Callable[..., RowLoader], consumed: int) -> None:
    uninterrupted = rows("dense")
    expected = list(islice(uninterrupted.batches(5), consumed + 4))[consumed:]
    stopped = rows("dense")
    list(islice(stopped.batches(5), consumed))
    resumed = rows("dense")
    resumed.state = LoaderState.model_validate_json(stopped.state.model_dump_json())
    for own, other in zip(islice(resumed.batches(5), 4), expected, strict=True):
        for a, b in zip(own, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_weights_stay_with_their_tokens(rows: Callable[..., RowLoader]) -> None:
    """The fixture's score is (id - 128) / 64, so the static Rho-1 weight is a step function of the token id."""
    batch = next(rows("rho1-static").batches(20))
    kept = batch.weights > 0
    inner = batch.position_ids > 0
    assert batch.input_ids[kept].min() > batch.input_ids[inner & ~kept].max()


@pytest.mark.parametrize("control", ["none", "shuffled", "random"])
@pytest.mark.parametrize("preset", ["rho1-static", "dense"])
def test_a_zipped_column_gives_the_rows_of_one_set_with_both(
    preset: str, control: str, make_shard_set: Callable[..., ShardSet], small_blocks: None
) -> None:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    columns = {name: [[np.nan, *rng.normal(size=n - 1)] for n in LENGTHS] for name in ("loss_a", "loss_b")}
    both = make_shard_set(sequences, columns, "both", 50)
    one, other = (make_shard_set(sequences, {name: columns[name]}, name, 50) for name in columns)
    config = WeightsConfig(preset=preset, column="loss_b", control=control)

    def first_epoch(*sets: ShardSet) -> list[Rows]:
        shards = ZippedSets(sets)
        loader = RowLoader(shards, make_weighting(config, shards), 64, seed=5)
        return list(islice(loader.batches(4), int(loader.rows_per_epoch()) // 4))

    zipped, expected = first_epoch(one, other), first_epoch(both)
    assert len(zipped) > 10
    for own, batch in zip(zipped, expected, strict=True):
        for values, wanted in zip(own, batch, strict=True):
            np.testing.assert_array_equal(values, wanted)


def test_other_ids_end_the_stream(scored_set: Callable[..., ShardSet], make_shard_set: Callable[..., ShardSet]) -> None:
    """The row group is read in a thread; the error reaches who asks for the rows."""
    shards = scored_set([20, 30], name="scored")
    sequences = [list(range(20)), list(range(30))]
    other = make_shard_set(sequences, {"loss_b": [[1.0] * 20, [1.0] * 30]}, "other", rows_per_shard=1)
    zipped = ZippedSets((shards, other))
    loader = RowLoader(zipped, make_weighting(WeightsConfig(preset="sparse", column="loss_b"), zipped), 64)
    with pytest.raises(
        UserError, match=r"other/shard-0000\d-of-00002.parquet: other input_ids than in .*/scored/shard"
    ):
        next(loader.batches(1))
