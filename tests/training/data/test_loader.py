"""The loader's stream: complete, deterministic, and resumable at every row."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from comparing import assert_same_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_column, list_lengths, write_shard
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.training.data import loader as loader_module
from weighted_mtp.training.data.loader import LoaderState, RowLoader
from weighted_mtp.training.rows import Rows
from weighted_mtp.training.weighting import make_weighting

LENGTHS = np.random.default_rng(0).integers(1, 90, 150).tolist()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small set have several row groups and blocks."""
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 500)
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


def test_epochs_hold_the_same_tokens_in_another_order(rows: Callable[..., RowLoader]) -> None:
    loader = rows(seed=3)
    epochs: dict[int, list[Rows]] = {0: [], 1: []}
    for batch in loader.batches(1):
        # A batch of one row never spans two blocks, so the state tells its epoch.
        if loader.state.epoch > 1:
            break
        epochs[loader.state.epoch].append(batch)
    expected = sorted(
        np.concatenate([flat_values(loader.shards.first.read(i)["input_ids"]) for i in range(3)]).tolist()
    )
    assert tokens(epochs[0]) == tokens(epochs[1]) == expected
    assert any((a.input_ids != b.input_ids).any() for a, b in zip(epochs[0], epochs[1], strict=False))


def test_order_does_not_depend_on_the_batch_size(rows: Callable[..., RowLoader]) -> None:
    by_one = np.concatenate([b.input_ids for b in islice(rows().batches(1), 60)])
    by_six = np.concatenate([b.input_ids for b in islice(rows().batches(6), 10)])
    np.testing.assert_array_equal(by_one, by_six)
    other_seed = np.concatenate([b.input_ids for b in islice(rows(seed=1).batches(6), 10)])
    assert (by_six != other_seed).any()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    consumed=st.integers(0, 40),
    batch_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    workers=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    preset=st.sampled_from(["uniform", "dense"]),
)
def test_a_resumed_stream_is_the_uninterrupted_one(
    rows: Callable[..., RowLoader], consumed: int, batch_sizes: tuple[int, int], workers: tuple[int, int], preset: str
) -> None:
    """Of any batch sizes and numbers of threads, before and after."""
    stopped = rows(preset, workers=workers[0])
    first = list(islice(stopped.batches(batch_sizes[0]), consumed))
    resumed = rows(preset, workers=workers[1])
    resumed.state = LoaderState.model_validate_json(stopped.state.model_dump_json())
    second = list(islice(resumed.batches(batch_sizes[1]), 4))
    total = consumed * batch_sizes[0] + 4 * batch_sizes[1]
    assert_same_rows(Rows.concatenate(first + second), next(rows(preset).batches(total)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_stop_and_continue_read_each_token_of_an_epoch_once(
    ranks: int, rows: Callable[..., RowLoader]
) -> None:
    """Each rank reads the stream by itself and takes its slice of every batch."""
    share, batches = 2, 7
    slices = []
    for rank in range(ranks):
        state = LoaderState()
        for _ in range(3):
            loader = rows(seed=2, workers=1 + rank % 2)
            loader.state = state
            parts = islice(loader.batches(ranks * share), batches)
            slices.append([part.take(slice(rank * share, (rank + 1) * share)) for part in parts])
            state = loader.state
    read = Rows.concatenate([part for parts in slices for part in parts])
    whole = next(rows(seed=2).batches(3 * batches * ranks * share))
    assert sorted(map(bytes, read.input_ids)) == sorted(map(bytes, whole.input_ids))


def test_a_block_holds_the_tokens_it_should_of_small_shards_too(scored_set: Callable[..., ShardSet]) -> None:
    shards = ZippedSets((scored_set([300] * 40, shards=40),))
    loader = RowLoader(shards, make_weighting(WeightsConfig(), shards), 64)
    assert len(next(loader.batches(150)).tokens) == 150
    assert loader.state == LoaderState(row=150)


def test_rows_name_the_shards_they_were_read_from(rows: Callable[..., RowLoader]) -> None:
    loader = rows(first_shard=10)
    batch = next(loader.batches(30))
    shards = loader.shards.first
    held = [set(flat_values(shards.read(i)["input_ids"]).tolist()) for i in range(3)]
    for ids, tokens, sources in zip(batch.input_ids, batch.tokens, batch.sources, strict=True):
        assert set(ids[:tokens].tolist()) <= set.union(*(held[number - 10] for number in sources))
    assert {len(sources) for sources in batch.sources} > {1}
    assert loader.files([np.array([11, 12]), np.array([11])]) == [
        str(shards.path / DATA / f"shard-0000{i}-of-00003.parquet") for i in (1, 2)
    ]
    assert loader.files([np.array([9, 13])]) == []


def test_documents_without_signal_are_counted(make_shard_set: Callable[..., ShardSet]) -> None:
    """A single token is no target. The third sequence has a weight only at its first token, where nothing predicts."""
    scores = [[np.nan, 0, 1], [np.nan], [1, np.nan, 0], [np.nan, np.nan]]
    shards = ZippedSets((make_shard_set([[1] * len(row) for row in scores], {"loss_a": scores}),))
    weighting = make_weighting(WeightsConfig(formula="loss_a"), shards)
    batch = next(RowLoader(shards, weighting, 16).batches(1))
    assert batch.silent.tolist() == [2]


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
        assert_same_rows(own, batch)
    names = [str(shards.path / DATA / shards.manifest.shards[0].name) for shards in (one, other)]
    shards = ZippedSets((one, other))
    assert RowLoader(shards, make_weighting(config, shards), 64).files([np.array([0])]) == names


@pytest.mark.parametrize("same_size", [True, False])
def test_a_shard_that_is_replaced_ends_the_stream(
    scored_set: Callable[..., ShardSet], small_blocks: None, same_size: bool
) -> None:
    """Whether the new file is another correct shard, or a copy of another one with its size."""
    shards = scored_set([40] * 60, shards=2)
    zipped = ZippedSets((shards,))
    loader = RowLoader(zipped, make_weighting(WeightsConfig(preset="uniform"), zipped), 64)
    stream = loader.batches(1)
    next(stream)
    first, second = shards.file(0).path, shards.file(1).path
    table = shards.read(1)
    if same_size:
        ids = flat_values(table["input_ids"])[::-1].copy()
        write_shard(first, table.set_column(2, "input_ids", list_column(ids, list_lengths(table["input_ids"]))))
        first.write_bytes(first.read_bytes().ljust(shards.manifest.shards[0].bytes, b"\0"))
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=rf"{first}: (content differs|shard has \d+ bytes instead of|shard is damaged)"):
        list(islice(stream, 200))


def test_other_ids_end_the_stream(scored_set: Callable[..., ShardSet], make_shard_set: Callable[..., ShardSet]) -> None:
    """The row group is read in a thread; the error reaches who asks for the rows."""
    shards = scored_set([20, 30], name="scored")
    sequences = [list(range(20)), list(range(30))]
    other = make_shard_set(sequences, {"loss_b": [[1.0] * 20, [1.0] * 30]}, "other", rows_per_shard=1)
    zipped = ZippedSets((shards, other))
    loader = RowLoader(zipped, make_weighting(WeightsConfig(preset="sparse", column="loss_b"), zipped), 64)
    with pytest.raises(
        UserError, match=r"other/data/shard-0000\d-of-00002.parquet: column 'input_ids' differs from .*/scored/data/"
    ):
        next(loader.batches(1))
