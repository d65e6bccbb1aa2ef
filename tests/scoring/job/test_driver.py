"""Faults of engines and workers in real runs: a real engine that fails on certain tokens, mostly in Ray workers."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray

from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine
from weighted_mtp.scoring.job import retry_policy
from weighted_mtp.scoring.job import run as scoring_run
from weighted_mtp.scoring.job.driver import ScoringJob
from weighted_mtp.scoring.job.scorer import load_scoring_engine

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

RAISE, NOT_A_NUMBER, CRASH, BREAK, CRASH_ONCE, EXHAUST = 1, 2, 3, 4, 5, 6
"""Tokens at which the engine fails; other sequences have none below 10."""


class FailingEngine:
    """An engine that fails on sequences with certain tokens."""

    def __init__(self, model: ScoringModel, config: EngineConfig, log: Path) -> None:
        self.engine = load_scoring_engine(model, config)
        self.config = config
        self.log = log
        self.broken = False

    @property
    def computed_tokens(self) -> int:
        return self.engine.computed_tokens

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        results = self.engine.score(requests)
        if requests[0].input_ids.tolist() == [0, 1]:  # the probe
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return results
        with open(self.log, "a") as log:
            log.write(f"{len(requests)} {self.config.batch_tokens}\n")
        for request, result in zip(requests, results, strict=True):
            self.fail_on(set(request.input_ids.tolist()), result)
        return results

    def fail_on(self, tokens: set[int], result: np.ndarray) -> None:
        if RAISE in tokens:
            raise ValueError("prompt is too long\nfor this engine")
        if NOT_A_NUMBER in tokens:
            result[0, -1] = np.nan
        if CRASH in tokens or (CRASH_ONCE in tokens and not self.log.with_suffix(".once").exists()):
            self.log.with_suffix(".once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if BREAK in tokens or self.broken:
            self.broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if EXHAUST in tokens and self.config.batch_tokens > 1000:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(scope="module", autouse=True)
def _running_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture(scope="module")
def plain(reference_model: Path) -> Engine:
    """An engine without faults."""
    return load_engine(reference_model, EngineConfig("transformers", None, "float32", 4096, 64, threads=1))


@pytest.fixture
def score(
    make_shard_set: Callable[..., ShardSet],
    reference_model: Path,
    tmp_path: Path,
    log: Path,
    plain: Engine,
    score_in_process: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., ShardSet]:
    """Scores twelve sequences in three shards, with failing tokens put into some of them.

    With `in_process` the worker is no actor, where only what happens inside it matters.
    """

    def fail(model: ScoringModel, config: EngineConfig) -> Engine:
        return FailingEngine(model, config, log)

    def make(faults: dict[int, int], in_process: bool = False, **settings: object) -> ShardSet:
        rng = np.random.default_rng(0)
        sequences = [rng.integers(10, 256, 30 + number).tolist() for number in range(12)]
        for number, token in faults.items():
            sequences[number][5] = token
        tokens = make_shard_set(sequences, rows_per_shard=4, name="tokens-" + "-".join(map(str, faults.values())))
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "reference": str(reference_model)}
        with monkeypatch.context() as patch:
            if in_process:
                patch.setattr(scoring_run, "score_missing", partial(score_in_process, load=fail))
            else:
                patch.setattr(scoring_run, "ScoringJob", partial(ScoringJob, load=fail))
            shards = run(ScoreConfig.model_validate(defaults | {"engine": "transformers"} | settings))
        assert shards is not None
        requests = [Request(np.array(ids, dtype=np.int32)) for ids in sequences]
        assert_equal_but(shards, [losses[0] for losses in plain.score(requests)], set(rejected(shards)))
        return shards

    return make


def rejected(shards: ShardSet) -> dict[int, str]:
    """Number of each rejected sequence in the corpus, and why."""
    file = shards.path / REJECTS
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = [shard.name for shard in shards.manifest.shards]
    for reject in found:
        assert reject["document_id"] == f"doc-{4 * names.index(reject['shard']) + reject['row']}"
        assert (reject["start"], reject["model"]) == (0, found[0]["model"])
    return {4 * names.index(reject["shard"]) + reject["row"]: reject["reason"] for reject in found}


def assert_equal_but(shards: ShardSet, expected: list[np.ndarray], without: set[int]) -> None:
    """All losses are those of an engine without faults, and the sequences `without` have none."""
    assert [check.fault for check in verify(shards.path, shards.manifest) if check.fault] == []
    assert [shard.rejects for shard in shards.manifest.shards] == [
        sum(number // 4 == index for number in without) for index in range(3)
    ]
    for index in range(3):
        for row, losses in enumerate(shards.read(index)["loss_reference"].to_pylist(), 4 * index):
            wanted = np.full_like(expected[row], np.nan) if row in without else expected[row]
            np.testing.assert_allclose(np.asarray(losses, np.float32), wanted, rtol=2.0**-10)
    assert not (shards.path / PROGRESS).exists()


def test_sequences_that_the_engine_refuses_are_left_out(score, log, capfd):
    shards = score({1: RAISE, 6: RAISE})
    assert rejected(shards) == {1: "ValueError: prompt is too long", 6: "ValueError: prompt is too long"}
    calls = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert sorted(calls) == [1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4], "each is found by halving"
    assert shards.manifest.columns["loss_reference"].statistics.missing == 12 + 30 + 35
    printed = capfd.readouterr()
    assert f"2 sequences could not be scored, see {shards.path / REJECTS}" in printed.out
    assert "2 x " in printed.out
    assert "llama-0: ValueError: prompt is too long" in printed.out


def test_invalid_losses_are_left_out(score, log):
    assert rejected(score({10: NOT_A_NUMBER}, in_process=True)) == {10: "token 39 has the score nan"}
    assert sorted(int(line.split()[0]) for line in log.read_text().splitlines()) == [1, 4, 4, 4], "tried again alone"


def test_a_shard_without_scorable_sequences_stops_the_run(score):
    with pytest.raises(
        UserError, match=r"no sequence of shard-00001-of-00003\S+ can be scored \(ValueError: prompt is"
    ):
        score(dict.fromkeys(range(4, 8), RAISE), in_process=True)


@pytest.mark.slow
def test_a_sequence_that_kills_its_worker_is_found_and_left_out(score, capfd):
    (reason,) = rejected(score({6: CRASH})).values()
    assert reason.startswith("workers died scoring it: ")
    printed = capfd.readouterr()
    assert printed.err.count("lost a worker") == 4, "two at full speed, two sequence by sequence"
    assert "incidents: 4" in printed.out


@pytest.mark.slow
def test_a_worker_that_was_killed_once_costs_nothing(score):
    assert rejected(score({6: CRASH_ONCE})) == {}


@pytest.mark.slow
def test_an_engine_that_a_sequence_breaks_is_replaced(score):
    (reason,) = rejected(score({6: BREAK})).values()
    assert reason == "workers died scoring it: RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.slow
def test_memory_that_runs_out_lowers_the_batch(score, log, capfd):
    assert rejected(score({6: EXHAUST, 11: EXHAUST}, batch_tokens=4000)) == {}
    batches = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert (batches[0], batches[-1], min(batches)) == (4000, 1000, 1000)
    assert (
        "out of memory (RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB): continuing with batches of 1000"
        in (capfd.readouterr().err)
    )


@pytest.mark.slow
def test_memory_that_never_suffices_stops_the_run(score, monkeypatch):
    monkeypatch.setattr(retry_policy, "MIN_BATCH_TOKENS", 3000)
    with pytest.raises(UserError, match=r"out of memory even with 4000 tokens at once \(RuntimeError: CUDA out of"):
        score({6: EXHAUST}, batch_tokens=4000)


def test_rejects_of_a_scored_set_are_kept_when_columns_are_added(score, score_here, base_model, tmp_path):
    first = score({6: RAISE}, in_process=True)
    added = run(
        ScoreConfig(
            input=first.path,
            output=tmp_path / "added",
            reference=first.manifest.columns["loss_reference"].origin.model,
            base=str(base_model),
            short_context=8,
            engine="transformers",
        )
    )
    assert added is not None
    assert (added.path / REJECTS).read_text() == (first.path / REJECTS).read_text()
    assert [shard.rejects for shard in added.manifest.shards] == [0, 1, 0]
    columns = ("loss_base", "excess_loss", "loss_short", "long_short")
    missing = [np.isnan(flat_values(added.read(1)[name])).sum() for name in columns]
    assert missing == [4, 3 + 36, 3 + 36, 3 + 36], "what was given up before is not tried again"
    (first.path / REJECTS).write_text("{}\n")
    with pytest.raises(UserError, match=r"rejects\.jsonl: missing or damaged \(shard: Field required\); restore it"):
        run(ScoreConfig(input=first.path, output=tmp_path / "other", reference=str(base_model), suffix="_b"))
