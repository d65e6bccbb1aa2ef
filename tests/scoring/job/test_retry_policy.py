"""Decisions of the job, event by event."""

import sys
from subprocess import run

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job import retry_policy as module
from weighted_mtp.scoring.job.retry_policy import ScoringPolicy, Worker
from weighted_mtp.scoring.job.units import Unit


def entries(*names: str) -> list[ShardEntry]:
    sizes = {"rows": 4, "tokens": 100, "longest": 50, "row_groups": 1, "bytes": 1}
    digests = {"sha256": "0" * 64, "footer_sha256": "0" * 64}
    return [ShardEntry(name=name, **sizes, **digests) for name in names]


@pytest.fixture
def lines() -> list[str]:
    """Reported incidents."""
    return []


@pytest.fixture
def policy(lines: list[str]) -> ScoringPolicy:
    return ScoringPolicy(entries("a", "b", "c", "d"), 1024, 2, lines.append)


def ready(policy: ScoringPolicy) -> Worker:
    """A worker with loaded models and all units that it may have."""
    worker = policy.add_worker()
    policy.set_ready(worker)
    assign(policy, worker)
    return worker


def assign(policy: ScoringPolicy, worker: Worker) -> list[Unit]:
    while policy.next_unit(worker):
        pass
    return worker.units


def names(units: list[Unit]) -> list[str]:
    return [unit.shard.name for unit in units]


def lose_until_one_by_one(policy: ScoringPolicy) -> Worker:
    """Lose as many workers as it takes until unit `a` is scored one by one; the worker that has it then."""
    for _ in range(module.FAILURES_BEFORE_ONE_BY_ONE):
        policy.lose(ready(policy), "killed")
    worker = ready(policy)
    assert (names(worker.units), worker.units[0].one_by_one) == (["a"], True)
    return worker


def test_needs_no_ray_and_no_torch():
    check = f"import sys, {module.__name__}; sys.exit(bool({{'ray', 'torch'}} & sys.modules.keys()))"
    assert run([sys.executable, "-c", check]).returncode == 0


def test_units_go_to_ready_workers_in_order_two_at_a_time(policy):
    first, second = policy.add_worker(), policy.add_worker()
    assert not policy.needs_worker()
    assert policy.next_unit(first) is None, "its models are not loaded"
    policy.set_ready(first)
    policy.set_ready(second)
    assert names(assign(policy, first)) == ["a", "b"]
    assert names(assign(policy, second)) == ["c", "d"]
    policy.complete(first, first.units[0], rejects=3)
    assert (policy.units_done, policy.tokens_done, policy.rejects) == (1, 100, 3)
    assert not policy.finished
    for worker in (first, second):
        for unit in list(worker.units):
            policy.complete(worker, unit, rejects=0)
    assert policy.finished
    assert not policy.needs_worker()


def test_no_more_workers_than_unfinished_units(policy):
    worker = ready(policy)
    for _ in range(3):
        policy.complete(worker, worker.units[0], rejects=0)
        assign(policy, worker)
    assert names(worker.units) == ["d"]
    assert not policy.needs_worker(), "the worker that is there has the last unit"


def test_units_of_a_lost_worker_come_first_again(policy, lines):
    worker = ready(policy)
    policy.lose(worker, "killed")
    assert [shard.name for shard in policy.pending] == ["a", "b", "c", "d"]
    assert lines == ["lost a worker (killed); scoring a, b again"]
    assert policy.workers == []
    assert policy.needs_worker()


def test_a_unit_that_lost_two_workers_is_alone_with_its_worker(policy):
    worker = lose_until_one_by_one(policy)
    other = ready(policy)
    assert names(other.units) == ["b"], "it lost as many workers, so it is alone, too"
    policy.complete(worker, worker.units[0], rejects=0)
    assert "a" not in policy.failures
    assert names(assign(policy, worker)) == ["c", "d"]


def test_a_unit_in_one_by_one_mode_waits_for_a_worker_without_units(policy):
    policy.failures["b"] = module.UnitFailures(workers=module.FAILURES_BEFORE_ONE_BY_ONE)
    worker = ready(policy)
    assert names(worker.units) == ["a"]
    policy.complete(worker, worker.units[0], rejects=0)
    assert names(assign(policy, worker)) == ["b"]


def test_a_sequence_that_lost_two_workers_is_given_up(policy):
    worker = lose_until_one_by_one(policy)
    policy.lose(worker, "killed", in_flight=("model", 3))
    worker = ready(policy)
    assert worker.units[0].given_up == {}
    policy.lose(worker, "killed", in_flight=("model", 3))
    assert ready(policy).units[0].given_up == {("model", 3): "workers died scoring it: killed"}


def test_different_sequences_are_counted_separately(policy):
    worker = lose_until_one_by_one(policy)
    for row in range(5):
        policy.lose(worker, "killed", in_flight=("model", row))
        worker = ready(policy)
        assert worker.units[0].given_up == {}


def test_too_many_sequences_given_up_stop_the_job(policy):
    worker = lose_until_one_by_one(policy)
    for row in range(module.MAX_UNEXPLAINED_FAILURES):
        for _ in range(module.FAILURES_BEFORE_GIVING_UP):
            policy.lose(worker, "killed", in_flight=("model", row))
            worker = ready(policy)
    policy.lose(worker, "killed", in_flight=("model", 100))
    worker = ready(policy)
    with pytest.raises(UserError, match=r"^a: 20 workers died scoring it \(killed\); if memory ran out, lower"):
        policy.lose(worker, "killed", in_flight=("model", 100))
    assert len(policy.failures["a"].given_up) == module.MAX_UNEXPLAINED_FAILURES + 1


def test_too_many_failures_between_sequences_stop_the_job(policy):
    worker = lose_until_one_by_one(policy)
    for _ in range(module.MAX_UNEXPLAINED_FAILURES):
        policy.lose(worker, "killed")
        worker = ready(policy)
    with pytest.raises(UserError, match=r"^a: 11 workers died scoring it"):
        policy.lose(worker, "killed")


def test_failures_of_nodes_are_not_counted(policy, lines):
    for _ in range(20):
        policy.lose(ready(policy), "its node died", caused_by_unit=False)
        policy.lose(policy.add_worker(), "its node died", caused_by_unit=False)
    assert policy.failures == {}
    assert policy.failed_starts == 0
    assert len(lines) == 40


def test_memory_that_runs_out_halves_the_batch_once(policy, lines):
    first, second = ready(policy), ready(policy)
    policy.halve_batch(first, "CUDA out of memory")
    policy.halve_batch(second, "CUDA out of memory")
    assert policy.batch_tokens == 512
    assert lines == ["out of memory (CUDA out of memory): continuing with batches of 512 tokens"]
    policy.release(first)
    assert names(assign(policy, ready(policy))) == ["a", "b"]
    assert policy.workers[-1].batch_tokens == 512
    policy.halve_batch(policy.workers[-1], "again")
    assert policy.batch_tokens == 256
    assert policy.failures == {}


def test_memory_that_never_suffices_stops_the_job(policy):
    for _ in range(2):
        policy.halve_batch(policy.add_worker(), "no memory")
    with pytest.raises(UserError, match=r"out of memory even with 256 tokens at once \(no memory\); use fewer"):
        policy.halve_batch(policy.add_worker(), "no memory")


def test_three_failed_starts_in_a_row_stop_the_job(policy):
    for _ in range(module.MAX_FAILED_STARTS - 1):
        policy.lose(policy.add_worker(), "killed")
    policy.set_ready(policy.add_worker())
    assert policy.failed_starts == 0
    policy.release(policy.workers[0])
    for _ in range(module.MAX_FAILED_STARTS - 1):
        policy.lose(policy.add_worker(), "killed")
    with pytest.raises(UserError, match=r"3 workers in a row failed to load their models \(killed\)"):
        policy.lose(policy.add_worker(), "killed")


def test_failed_starts_beside_ready_workers_limit_the_pool(policy, lines):
    ready(policy)
    for _ in range(module.MAX_FAILED_STARTS):
        assert policy.needs_worker()
        policy.lose(policy.add_worker(), "killed")
    assert "3 workers in a row could not start: continuing with 1" in lines
    assert policy.max_workers == 1
    assert not policy.needs_worker()
