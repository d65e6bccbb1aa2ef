"""A worker in this process, with an engine whose losses are the token ids divided by ten."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shard_files import read_shard

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.rounding import round_nats
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_column, list_lengths, write_shard
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import plan_columns
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.job.faults import BrokenEngineError, OutOfMemoryError
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.units import Unit, new_attempt, pop_note
from weighted_mtp.scoring.job.worker import Outcome, ScoringWorker, outcome_of

MODEL = ScoringModel("m", Path("m"), "fingerprint", None)
REFUSED = 100


class PlainEngine:
    """Raises on sequences that start with `REFUSED`."""

    refusal: BaseException = ValueError("refused")

    def __init__(self) -> None:
        self.computed_tokens = 0

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        if any(request.input_ids[0] == REFUSED for request in requests):
            raise self.refusal
        self.computed_tokens += sum(len(request.input_ids) for request in requests)
        losses = [request.input_ids.astype(np.float32)[None] / 10 for request in requests]
        for of_one in losses:
            of_one[:, 0] = np.nan
        return losses


@pytest.fixture
def task(tmp_path: Path, make_shard_set: Callable[..., ShardSet]) -> ScoringTask:
    source = make_shard_set([[1, 2, 3], [REFUSED, 5], [6, 7]], rows_per_shard=3)
    output = tmp_path / "output"
    (output / PROGRESS).mkdir(parents=True)
    config = EngineConfig("transformers", None, "float32", batch_tokens=64, max_length=3, threads=1)
    return ScoringTask(source.reader, output, plan_columns(MODEL, None, None), config, None)


@pytest.fixture
def unit(task: ScoringTask) -> Callable[..., Unit]:
    (shard,) = ShardSet.open(task.source.directory.parent).manifest.shards
    return lambda *settings: Unit(shard, new_attempt(shard.name), *settings)


def started(task: ScoringTask, engine: PlainEngine) -> ScoringWorker:
    worker = ScoringWorker(task, lambda model, config: engine)
    assert worker.computed_tokens() == 0
    assert worker.start() == Outcome("done")
    assert worker.computed_tokens() == 0, "the probe does not count"
    return worker


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_unit_is_written_under_the_names_of_its_attempt(task, unit, one_by_one: bool) -> None:
    worker, asked = started(task, PlainEngine()), unit(one_by_one)
    assert worker.score(asked) == Outcome("done", rejects=1)
    probes = 1 if one_by_one else 3  # after each refusal: of all rows, of the last two, of the second
    assert worker.computed_tokens() == 5 + 2 * probes, "3 and 2 tokens, and 2 for each probe"
    losses = flat_values(read_shard(asked.attempt.shard(task.output))["loss_reference"])
    nan = np.nan
    np.testing.assert_array_equal(losses, np.array([nan, 102, 154, nan, nan, nan, 358]) / 512)
    assert asked.attempt.record(task.output).exists()
    assert pop_note(task.output, asked.attempt) is None


def test_engines_compute_one_shard_while_another_is_completed(task, unit, monkeypatch: pytest.MonkeyPatch) -> None:
    second_shard_computed = threading.Event()
    threads = []

    class Engine(PlainEngine):
        def score(self, requests: list[Request]) -> list[np.ndarray]:
            threads.append(threading.current_thread())
            if len(threads) == 3:  # the first was the probe
                second_shard_computed.set()
            return super().score(requests)

    def round_later(scores: np.ndarray) -> np.ndarray:
        assert second_shard_computed.wait(60)
        return round_nats(scores)

    monkeypatch.setattr("weighted_mtp.scoring.job.scorer.round_nats", round_later)
    monkeypatch.setattr(f"{__name__}.REFUSED", -1)
    worker, units = started(task, Engine()), [unit(), unit()]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(worker.score, units)) == [Outcome("done")] * 2
    assert len(threads) == 3
    assert len({*threads}) == 1
    first, second = (asked.attempt.shard(task.output).read_bytes() for asked in units)
    assert first == second


def test_a_shard_with_swapped_tokens_is_not_scored(task, unit) -> None:
    """It is a correct shard of the same size, whose scores would make it look like the one in the manifest."""
    asked = unit(False)
    file = task.source.file(asked.shard)
    table = read_shard(file.path)
    ids, lengths = flat_values(table["input_ids"]).copy(), list_lengths(table["input_ids"])
    ids[[1, 2]] = ids[[2, 1]]
    swapped = write_shard(file.path, table.set_column(2, "input_ids", list_column(ids, lengths)))
    assert (swapped.rows, swapped.tokens) == (asked.shard.rows, asked.shard.tokens)
    outcome = started(task, PlainEngine()).score(asked)
    assert outcome.kind == "failed"
    assert "content differs from the manifest" in str(outcome.error)
    assert not asked.attempt.shard(task.output).exists()


def test_given_up_sequences_are_not_tried(task, unit) -> None:
    engine = PlainEngine()
    engine.refusal = SystemExit()
    asked = unit(True, {("fingerprint", 1): "workers died of it"})
    assert started(task, engine).score(asked) == Outcome("done", rejects=1)


def test_the_note_names_the_sequence_that_ended_the_process(task, unit) -> None:
    engine = PlainEngine()
    engine.refusal = SystemExit()
    asked = unit(True)
    with pytest.raises(SystemExit):
        started(task, engine).score(asked)
    assert pop_note(task.output, asked.attempt) == ("fingerprint", 1)


def test_memory_that_runs_out_is_an_outcome(task, unit) -> None:
    engine = PlainEngine()
    engine.refusal = RuntimeError("CUDA out of memory")
    assert started(task, engine).score(unit()) == Outcome("out_of_memory", reason="RuntimeError: CUDA out of memory")


def test_an_engine_that_cannot_be_loaded_is_an_outcome(task) -> None:
    def load(model: ScoringModel, config: EngineConfig) -> PlainEngine:
        raise ValueError("bad weights")

    outcome = ScoringWorker(task, load).start()
    assert outcome.kind == "failed"
    assert str(outcome.error) == "m: transformers cannot run it (ValueError: bad weights); check the checkpoint"


def test_a_socket_path_that_is_too_long_for_vllm_is_a_user_error(task, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: ScoringModel, config: EngineConfig) -> PlainEngine:
        raise RuntimeError('ipc path "/scratch/long" is longer than 107 characters (sizeof(sockaddr_un.sun_path)).')

    monkeypatch.setattr("tempfile.tempdir", "/scratch")
    outcome = ScoringWorker(task, load).start()
    assert outcome.kind == "failed"
    assert str(outcome.error) == (
        "/scratch: too long a path for sockets; set TMPDIR to a shorter directory for temporary files"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("full"), "out_of_memory"),
        (BrokenEngineError("dead"), "broken"),
        (UserError("wrong file"), "failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "failed"),
    ],
)
def test_exceptions_become_outcomes(error: Exception, kind: str) -> None:
    def job() -> Outcome:
        raise error

    outcome = outcome_of(job, "testing")
    assert outcome.kind == kind
    if kind == "failed":
        assert outcome.error is error
        assert outcome.trace.startswith("Traceback")
    else:
        assert (outcome.reason, outcome.error) == (str(error), None)


def test_a_bug_names_what_the_worker_was_doing() -> None:
    outcome = outcome_of(lambda: Outcome("done", rejects=1 // 0), "scoring shard-0")
    message = "scoring shard-0 failed: ZeroDivisionError: integer division or modulo by zero; rerunning the same"
    assert isinstance(outcome.error, UserError)
    assert str(outcome.error).startswith(message)
