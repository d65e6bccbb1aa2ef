"""Weight statistics, worked out by hand and against plain loops."""

from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighted_mtp.pipelines.reports.weight_statistics import WeightStatistics, position_names
from weighted_mtp.schemas.shard_set.manifest import Manifest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

SEQUENCES = [[7, 1, 2, 2, 1], [1], [7, 3, 3], [1, 2]]


@pytest.fixture
def manifest(make_shard_set: Callable[..., ShardSet]) -> Manifest:
    return make_shard_set(SEQUENCES).manifest


def gathered(manifest: Manifest, rows: list[list[float]], scored: list[list[bool]]) -> WeightStatistics:
    """The weights of `SEQUENCES`, given in two parts."""
    statistics = WeightStatistics(manifest)
    for part in (slice(0, 3), slice(3, 4)):
        ids, weights, known = (np.concatenate([np.array(row) for row in of[part]]) for of in (SEQUENCES, rows, scored))
        lengths = np.array([len(row) for row in SEQUENCES[part]])
        statistics.add(ids, weights.astype(np.float32), known.astype(bool), lengths)
    return statistics


def test_numbers_worked_out_by_hand(manifest: Manifest) -> None:
    """Seven targets; the weights of first tokens, 9 here, are not counted."""
    weights = [[9, 0, 2, 1, 0], [9], [9, 0, 0], [9, 3]]
    scored = [[0, 1, 1, 1, 1], [0], [0, 1, 0], [0, 1]]
    statistics = gathered(manifest, weights, scored)
    assert (statistics.tokens, statistics.targets, statistics.scored, statistics.kept) == (11, 7, 6, 3)
    assert (statistics.sequences, statistics.silent) == (3, 1)
    assert statistics.mean == 6 / 7
    assert statistics.typical == 2
    assert statistics.effective_share == pytest.approx(36 / 14 / 7, rel=1e-12)
    assert statistics.quantiles((0.0, 4 / 7, 5 / 7, 6 / 7, 0.9, 1.0)) == [0, 0, 1, 2, 3, 3]
    assert statistics.histogram() == [("0", 4), ("1", 1), ("2", 1), ("3", 1)]
    by_position = statistics.by_position
    assert position_names(manifest.longest) == ["1", "2 to 3", "4 to 7"]
    assert by_position.targets.tolist() == [3, 3, 1]
    assert by_position.kept.tolist() == [1, 2, 0]
    assert by_position.mean.tolist() == [1, 1, 0]
    by_id = statistics.by_id
    assert {int(i): (int(by_id.targets[i]), int(by_id.kept[i])) for i in np.flatnonzero(by_id.targets)} == {
        1: (2, 0),
        2: (3, 3),
        3: (2, 0),
    }
    assert by_id.weight[2] == 6
    assert np.isnan(by_id.kept_share[7])


def test_negative_weights_count_by_their_size(manifest: Manifest) -> None:
    weights = [[0, -2, 2, 0, 0], [0], [0, -1, -1], [0, 0]]
    statistics = gathered(manifest, weights, [[1] * len(row) for row in SEQUENCES])
    assert statistics.kept == 4
    assert statistics.mean == -2 / 7
    assert statistics.typical == 6 / 4
    assert statistics.effective_share == pytest.approx(36 / 10 / 7, rel=1e-12)
    assert statistics.silent == 1
    assert statistics.histogram() == [("-2", 1), ("-1", 2), ("0", 3), ("2", 1)]


def test_no_weight_at_all(manifest: Manifest) -> None:
    statistics = gathered(manifest, [[0] * len(row) for row in SEQUENCES], [[0] * len(row) for row in SEQUENCES])
    assert (statistics.kept, statistics.mean, statistics.typical, statistics.effective_share) == (0, 0, 0, 0)
    assert statistics.silent == statistics.sequences == 3
    assert statistics.histogram() == [("0", 7)]


def test_uniform_weights_are_all_effective(manifest: Manifest) -> None:
    statistics = gathered(manifest, [[1] * len(row) for row in SEQUENCES], [[1] * len(row) for row in SEQUENCES])
    assert statistics.effective_share == 1
    assert statistics.histogram() == [("1", 7)]


def test_nearly_equal_weights_share_one_line(manifest: Manifest) -> None:
    weights = [[1, 1.6, 1.61, 1.62, 0], [1], [1, 1.6, 1.605], [1, 1.615]]
    statistics = gathered(manifest, weights, [[1] * len(row) for row in SEQUENCES])
    assert statistics.histogram() == [("0", 1), ("1.6 to 1.62", 6)]


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([-1.5, 0.0, 0.25, 1.0, 7.0])), min_size=1, max_size=20),
    min_size=1,
    max_size=8,
).filter(lambda rows: any(len(row) > 1 for row in rows))


@given(rows=sequences, cut=st.integers(0, 8))
def test_all_totals_are_those_of_plain_loops(
    rows: list[list[tuple[int, float]]], cut: int, manifest_of_twenty: Manifest
) -> None:
    statistics = WeightStatistics(manifest_of_twenty)
    for part in (rows[:cut], rows[cut:]):
        if part:
            flat = [token for row in part for token in row]
            ids, weights = np.array([i for i, _ in flat]), np.array([w for _, w in flat], np.float32)
            statistics.add(ids, weights, weights >= 0, np.array([len(row) for row in part]))
    by_id: dict[int, list[float]] = defaultdict(list)
    by_position: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        for position, (index, weight) in enumerate(row):
            if position:
                by_id[index].append(weight)
                by_position[position.bit_length() - 1].append(weight)
    for totals, expected in ((statistics.by_id, by_id), (statistics.by_position, by_position)):
        for group in range(len(totals.targets)):
            values = expected[group]
            assert totals.targets[group] == len(values)
            assert totals.kept[group] == sum(value != 0 for value in values)
            assert totals.weight[group] == sum(values)
            assert totals.magnitude[group] == sum(map(abs, values))
    everything = sorted(value for values in by_id.values() for value in values)
    squares = sum(Fraction(value) ** 2 for value in everything)
    effective = sum(abs(Fraction(value)) for value in everything) ** 2 / squares / len(everything) if squares else 0
    assert statistics.effective_share == pytest.approx(float(effective), rel=1e-12)
    assert statistics.scored == sum(value >= 0 for value in everything)
    assert statistics.silent == sum(len(row) > 1 and not any(weight for _, weight in row[1:]) for row in rows)
    for share in (0.0, 0.07, 0.29, 0.5, 1.0):
        [found] = statistics.quantiles((share,))
        reached = [v for v in everything if sum(w <= v for w in everything) >= Fraction(str(share)) * len(everything)]
        assert found == min(reached)


@pytest.fixture(scope="module")
def manifest_of_twenty() -> Manifest:
    """A minimal manifest for statistics: ten ids, sequences of at most twenty tokens."""
    shards = [{"name": "a", "rows": 1, "tokens": 20, "longest": 20, "row_groups": 1, "bytes": 99}]
    digests = {"sha256": "0" * 64, "footer_sha256": "0" * 64}
    tokenizer = {"name": "t", "fingerprint": "", "files_sha256": "0" * 64, "vocab_size": 10}
    corpus = {"input": "", "text_field": "", "max_length": 20, "adds_bos": False, "adds_eos": False}
    return Manifest.model_validate(
        {
            "corpus": corpus | {"documents": 1, "rejects": 0},
            "tokenizer": tokenizer | {"bos_token_id": None, "eos_token_id": None},
            "shards": [shards[0] | digests],
            "request": {},
        }
    )


def test_intervals_hold_all_weights_and_the_last_takes_the_largest(manifest_of_twenty: Manifest) -> None:
    statistics = WeightStatistics(manifest_of_twenty)
    weights = np.concatenate([[0], np.arange(1, 1001) / 1000, [50, 0, 0]]).astype(np.float32)
    statistics.add(np.zeros(len(weights), np.int64), weights, weights > 0, np.array([20] * 50 + [4]))
    # A first token of every sequence is no target: 51 of the thousand and four.
    lines = statistics.histogram()
    assert sum(count for _, count in lines) == statistics.targets == 953
    assert lines[0] == ("0", 2)
    assert len(lines) == 13
    assert lines[-1][0].endswith(" and more")
    low = float(lines[-1][0].split()[0])
    assert lines[-1][1] == int((statistics.ascending >= np.float32(low)).sum())
    for name, count in lines[1:-1]:
        low, high = map(float, name.split(" to "))
        inside = int(((statistics.ascending >= low) & (statistics.ascending < high)).sum())
        assert abs(count - inside) <= 1, "names are rounded"
