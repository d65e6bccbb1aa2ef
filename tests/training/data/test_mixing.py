"""Mixed streams: exact shares, every set a stream of its own, resumable at every row."""

from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_same_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import DATA
from weighted_mtp.training.data import loader as loader_module
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.data.mixing import MixedLoader, MixState, assign_rows, make_loader, mix_identity, open_mix
from weighted_mtp.training.rows import Rows

PARTS = st.lists(st.integers(1, 60), min_size=2, max_size=12)


@pytest.fixture
def mixed(scored_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> Callable[..., MixedLoader]:
    """`mixed()` takes rows of 64 from three sets of several blocks, with shares of 1/2, 0.3 and 0.2."""
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(loader_module, "BLOCK_TOKENS", 1000)
    monkeypatch.setattr(loader_module, "BLOCK_ROWS", 1)
    rng = np.random.default_rng(0)
    paths = [scored_set(rng.integers(1, 90, 60).tolist(), f"set-{seed}", seed=seed).path for seed in range(3)]

    def build(preset: str = "uniform", workers: int = 1, seed: int = 0) -> MixedLoader:
        settings = {"mix": dict(zip(map(str, paths[1:]), (0.3, 0.2), strict=True)), "loader_workers": workers}
        config = TrainConfig(
            input=paths[0], model="m", output=Path("o"), weights={"preset": preset}, seed=seed, **settings
        )
        loader = make_loader(config, ZippedSets.open(config.input), open_mix(config.mix), 64)
        assert isinstance(loader, MixedLoader)
        return loader

    return build


@settings(max_examples=200)
@given(PARTS)
def test_every_set_is_within_one_row_of_its_share_at_any_time(parts: list[int]) -> None:
    shares = [Fraction(part, sum(parts)) for part in parts]
    origins = next(assign_rows(shares, [0] * len(parts), 400))
    counts = np.cumsum(origins[:, None] == np.arange(len(parts)), axis=0)
    rows = np.arange(1, 401)[:, None]
    bound = 1 - 1 / (2 * len(parts) - 2)
    assert np.abs(counts - rows * parts / np.sum(parts)).max() <= bound + 1e-9


@given(PARTS, st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_the_schedule_goes_on_from_what_was_drawn(parts: list[int], batch_sizes: list[int]) -> None:
    shares = [Fraction(part, sum(parts)) for part in parts]
    whole = next(assign_rows(shares, [0] * len(parts), sum(batch_sizes))).tolist()
    origins: list[int] = []
    for rows in batch_sizes:
        drawn = np.bincount(np.array(origins, dtype=int), minlength=len(parts)).tolist()
        origins += next(assign_rows(shares, drawn, rows)).tolist()
    assert origins == whole


def test_schedule_by_hand() -> None:
    """Halves take turns. A quarter is due in the middle of its four rows; of two sets due at once the first goes."""
    assert next(assign_rows([Fraction(1, 2), Fraction(1, 2)], [0, 0], 6)).tolist() == [0, 1, 0, 1, 0, 1]
    assert next(assign_rows([Fraction(3, 4), Fraction(1, 4)], [0, 0], 8)).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_each_set_gives_the_rows_of_its_own_stream(mixed: Callable[..., MixedLoader]) -> None:
    """That of the first set is the one without a mix. By their sources rows are told apart."""
    loader = mixed("rho1-static")
    batch = next(loader.batches(100))
    number = np.array([sources[0] // 2 for sources in batch.sources])
    assert np.bincount(number).tolist() == [50, 30, 20]
    for i, own in enumerate(mixed("rho1-static").loaders):
        assert_same_rows(batch.take(number == i), next(own.batches(int((number == i).sum()))))
    first = mixed().loaders[0]
    alone = RowLoader(first.shards, first.weighting, 64)
    assert_same_rows(next(first.batches(40)), next(alone.batches(40)))


def test_each_set_is_read_once_in_each_of_its_epochs(mixed: Callable[..., MixedLoader]) -> None:
    loader = mixed()
    seen: dict[tuple[int, int], int] = {}
    for batch in loader.batches(1):
        number = int(batch.sources[0][0]) // 2
        epoch = loader.state.sets[number].epoch
        seen[number, epoch] = seen.get((number, epoch), 0) + int(batch.tokens.sum())
        if loader.state.sets[2].epoch == 2:
            break
    held = [one.shards.first.manifest.tokens for one in loader.loaders]
    assert [seen[number, 0] for number in range(3)] == held
    assert seen[0, 1] == held[0]
    assert seen[2, 1] == held[2]
    assert seen[0, 2] > seen[1, 1] / 2


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    consumed=st.integers(0, 40),
    batch_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    workers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    preset=st.sampled_from(["uniform", "sparse"]),
)
def test_a_resumed_stream_is_the_uninterrupted_one(
    mixed: Callable[..., MixedLoader],
    consumed: int,
    batch_sizes: tuple[int, int],
    workers: tuple[int, int],
    preset: str,
) -> None:
    """Of any batch sizes and numbers of threads, before and after."""
    stopped = mixed(preset, workers[0])
    first = list(islice(stopped.batches(batch_sizes[0]), consumed))
    resumed = mixed(preset, workers[1])
    resumed.state = MixState.model_validate_json(stopped.state.model_dump_json())
    second = list(islice(resumed.batches(batch_sizes[1]), 4))
    total = consumed * batch_sizes[0] + 4 * batch_sizes[1]
    assert_same_rows(Rows.concatenate(first + second), next(mixed(preset).batches(total)))


def test_an_epoch_is_that_of_the_first_set(mixed: Callable[..., MixedLoader]) -> None:
    loader = mixed()
    assert loader.rows_per_epoch() == pytest.approx(2 * loader.loaders[0].rows_per_epoch())


def test_files_of_all_sets_are_named(mixed: Callable[..., MixedLoader]) -> None:
    loader = mixed()
    files = loader.files([np.array([0, 3]), np.array([5, 3])])
    sets = [one.shards.first.path for one in loader.loaders]
    expected = [sets[0] / DATA / "shard-00000-of-00002.parquet"] + [
        path / DATA / "shard-00001-of-00002.parquet" for path in sets[1:]
    ]
    assert files == list(map(str, expected))


def test_identity_has_sets_and_shares_in_order(scored_set: Callable[..., ShardSet]) -> None:
    one, other = (str(scored_set([20, 30], name, seed=seed).path) for seed, name in enumerate("ab"))
    identities = []
    for mix in ({one: 0.25}, {one: 0.3}, {other: 0.25}, {one: 0.25, other: 0.25}, {other: 0.25, one: 0.25}):
        config = TrainConfig(input=one, model="m", output=Path("o"), mix=mix)
        identities.append(mix_identity(config, open_mix(config.mix))["mix"])
    assert len(set(identities)) == len(identities)


def test_a_set_without_anything_to_predict_is_refused(scored_set: Callable[..., ShardSet]) -> None:
    one, other = scored_set([20, 30], "one"), scored_set([1, 1], "other")
    config = TrainConfig(input=one.path, model="m", output=Path("o"), mix={str(other.path): 0.5})
    with pytest.raises(UserError, match="/other: no sequence has two tokens"):
        make_loader(config, ZippedSets((one,)), open_mix(config.mix), 64)


@pytest.mark.parametrize("mix", [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.2, "c": 0.7}])
def test_shares_must_leave_rows_to_the_input(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sum to less than 1"):
        TrainConfig(input="i", model="m", output=Path("o"), mix=mix)
