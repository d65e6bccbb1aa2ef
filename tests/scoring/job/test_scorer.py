"""One shard through the scorer, with an engine whose losses are worked out by plain code."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_files import read_shard

from weighted_mtp.schemas.shard_set.manifest import ShortContext
from weighted_mtp.schemas.shard_set.rounding import round_nats
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.files import DATA, PROGRESS
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement, plan_columns
from weighted_mtp.scoring.conditions.short_context import plan_windows
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.job.scorer import ScoringTask, ShardScorer, measure
from weighted_mtp.scoring.job.units import Attempt, commit, gather, write_unit

CONFIG = EngineConfig("transformers", None, "float32", batch_tokens=64, max_length=64, threads=1)
BOS = 256


def fake_loss(context: np.ndarray, token: int, factor: float) -> float:
    """A number that changes with every token of the context, its place, and the token itself."""
    return factor * float((context * np.arange(1, len(context) + 1)).sum() * 7 + token * 13 + len(context)) % 11


class FakeEngine:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls = 0
        self.computed_tokens = 0

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        self.calls += 1
        self.computed_tokens += sum(len(request.input_ids) for request in requests)
        return [self.result(request) for request in requests]

    def result(self, request: Request) -> np.ndarray:
        losses = self.losses([request.input_ids])[request.first_scored :]
        lines = {"loss": losses, "entropy": losses + 100}
        return np.stack([lines[quantity] for quantity in request.quantities])

    def losses(self, sequences: list[np.ndarray]) -> np.ndarray:
        losses = [
            np.nan if i == 0 else fake_loss(ids[:i], ids[i], self.factor) for ids in sequences for i in range(len(ids))
        ]
        return np.asarray(losses, np.float32)


def short_losses(ids: np.ndarray, size: int, stride: int) -> list[float]:
    """Loss of every token from the window that scores it, found by search."""
    losses = [np.nan]
    for token in range(1, len(ids)):
        start = 0
        if token >= size:
            start = next(s for s in range(0, len(ids), stride) if s + size - stride <= token < s + size)
        context = ids[start:token].copy()
        if ids[0] == BOS:
            context[0] = BOS
        losses.append(fake_loss(context, ids[token], 1.0))
    return losses


@pytest.fixture
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 200, length).astype(np.int32) for length in (30, 1, 8, 9, 2, 50)]
    sequences[0][0] = sequences[3][0] = BOS
    return sequences


def measured(
    engine: FakeEngine, sequences: list[np.ndarray], wanted: dict[str, Measurement], known: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns by name, the sequences one after the other."""
    of_sequences = None if known is None else np.split(known, np.cumsum([len(ids) for ids in sequences])[:-1])
    scores = measure(engine, sequences, list(wanted.values()), BOS, of_sequences)
    return dict(zip(wanted, np.concatenate(scores, axis=1), strict=True))


def test_short_context_losses_equal_a_search_for_each_token(sequences, models):
    model = models[0]
    windows = {"a": ShortContext(size=8, stride=6), "b": ShortContext(size=5, stride=1)}
    measurements = {name: Measurement(model, window) for name, window in windows.items()}
    measurements |= {"full": Measurement(model), "entropy": Measurement(model, quantity="entropy")}
    engine = FakeEngine()
    scores = measured(engine, sequences, measurements)
    assert engine.calls == 1, "one call, so that the engine can fill its batches"
    full = FakeEngine().losses(sequences)
    np.testing.assert_array_equal(scores["full"], full)
    np.testing.assert_array_equal(scores["entropy"], full + 100)
    for name, window in windows.items():
        expected = np.concatenate([short_losses(ids, window.size, window.stride) for ids in sequences])
        np.testing.assert_allclose(scores[name], expected, rtol=1e-6)
        assert not np.array_equal(scores[name], full, equal_nan=True)


def test_stored_losses_of_the_full_context_are_not_computed_again(sequences, models):
    window = ShortContext(size=8, stride=6)
    short = {"short": Measurement(models[0], window)}
    stored = FakeEngine().losses(sequences)
    engine = FakeEngine()
    scores = measured(engine, sequences, short, stored)
    np.testing.assert_array_equal(scores["short"], measured(FakeEngine(), sequences, short)["short"])
    windows = [span for ids in sequences for span in plan_windows(len(ids), window.size, window.stride)]
    assert engine.computed_tokens == sum(span.end - span.start for span in windows)
    entropy = {"entropy": Measurement(models[0], quantity="entropy")}
    scores = measured(FakeEngine(), sequences, short | entropy, stored)
    np.testing.assert_array_equal(scores["entropy"], stored + 100)


@pytest.fixture
def models() -> tuple[ScoringModel, ScoringModel]:
    return ScoringModel("ref", Path("ref"), "1", 64), ScoringModel("base", Path("base"), "2", 64)


@pytest.fixture
def scorer(monkeypatch, tmp_path, make_shard_set, sequences, models) -> ShardScorer:
    engines = {"ref": FakeEngine(1.0), "base": FakeEngine(1.001)}
    monkeypatch.setattr("weighted_mtp.schemas.shard_set.shards.ROW_GROUP_TOKENS", 35)
    source = make_shard_set([ids.tolist() for ids in sequences], rows_per_shard=6)
    output = tmp_path / "output"
    (output / PROGRESS).mkdir(parents=True)
    plan = plan_columns(*models, ShortContext(size=8, stride=6))
    task = ScoringTask(source.reader, output, plan, CONFIG, BOS)
    scorer = ShardScorer(task, lambda model, config: engines[model.directory.name])
    (shard,) = source.manifest.shards
    attempt = Attempt(shard.name, "1")
    scored = scorer.score(shard.name, task.source.file(shard).read_hashed())
    write_unit(output, attempt, scored, plan.columns, 0.0)
    commit(output, attempt)
    return scorer


def test_scored_shard_has_the_source_rows_and_the_columns(scorer, sequences):
    name = "shard-00000-of-00001.parquet"
    source, output = scorer.task.source.directory / name, scorer.task.output / DATA / name
    table = read_shard(output)
    columns = ["loss_reference", "loss_base", "loss_short", "excess_loss", "long_short"]
    assert table.column_names == ["document_id", "start", "input_ids", *columns]
    assert table.select(["document_id", "start", "input_ids"]).equals(read_shard(source))
    groups = [pq.read_metadata(path).num_row_groups for path in (source, output)]
    assert groups == [2, 2]
    for name, losses in (
        ("reference", FakeEngine(1.0).losses(sequences)),
        ("base", FakeEngine(1.001).losses(sequences)),
    ):
        expected = np.where(losses < 2, np.round(losses * 512) / 512, losses).astype(np.float16)
        np.testing.assert_array_equal(flat_values(table[f"loss_{name}"]), expected)


def test_contrasts_are_subtracted_before_rounding(scorer, sequences):
    """Losses that differ by less than a float16 step near 8 keep their difference."""
    table = read_shard(scorer.task.output / DATA / "shard-00000-of-00001.parquet")
    reference = FakeEngine(1.0).losses(sequences)
    base = FakeEngine(1.001).losses(sequences)
    excess = flat_values(table["excess_loss"])
    np.testing.assert_array_equal(excess, round_nats(base - reference))
    rounded_first = flat_values(table["loss_base"]) - flat_values(table["loss_reference"])
    assert not np.array_equal(excess, rounded_first, equal_nan=True)


def test_record_describes_the_shard(scorer):
    name = "shard-00000-of-00001.parquet"
    found = gather(scorer.task.output, [name])
    (entry,) = found.entries
    assert entry.name == name
    assert entry.bytes == (scorer.task.output / DATA / name).stat().st_size
    assert (entry.rows, entry.tokens, entry.row_groups, entry.longest, entry.rejects) == (6, 100, 2, 50, 0)
    assert set(found.counts) == {"loss_reference", "loss_base", "loss_short", "excess_loss", "long_short"}
    expected = ValueCounts()
    expected.add(flat_values(read_shard(scorer.task.output / DATA / name)["long_short"]))
    np.testing.assert_array_equal(found.counts["long_short"].counts, expected.counts)


def test_list_columns_keep_sequences_apart(scorer, sequences):
    table = read_shard(scorer.task.output / DATA / "shard-00000-of-00001.parquet")
    long_short = table["long_short"].to_pylist()
    assert [len(row) for row in long_short] == [len(ids) for ids in sequences]
    assert all(np.isnan(row[0]) for row in long_short)
