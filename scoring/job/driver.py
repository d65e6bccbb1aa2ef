"""The scoring job: assigns units to workers until all are done, despite lost workers, lost nodes or lack of memory.

The policy decides, the fleet acts, and the driver passes events between them. Workers return only the outcomes of
units; the driver commits the units.

Alternatives: Ray Data cannot identify the unit of a dead worker, replace a worker by one with a smaller batch, or
report a pool that never fits. `ray.util.ActorPool` neither replaces dead actors nor relates failures to units.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig
from weighted_mtp.scoring.job.fleet import CallResult, Death, WorkerFleet
from weighted_mtp.scoring.job.ray_cluster import check_places
from weighted_mtp.scoring.job.report import Progress
from weighted_mtp.scoring.job.retry_policy import ScoringPolicy, Worker
from weighted_mtp.scoring.job.scorer import ScoringTask, load_scoring_engine
from weighted_mtp.scoring.job.units import Attempt, pop_note
from weighted_mtp.scoring.job.worker_pool import WorkerPool

POLL_SECONDS = 1.0


class ScoringJob:
    """Scores units on the connected Ray cluster.

    Args:
        task: what to compute for each unit.
        units: the shards to score.
        pool: number and resources of the workers.
        report: called with one line about each incident.
        commit: moves the files of a finished attempt to their final names.
        load: creates an engine; tests and benchmarks replace it.
    """

    def __init__(
        self,
        task: ScoringTask,
        units: list[ShardEntry],
        pool: WorkerPool,
        report: Callable[[str], None],
        commit: Callable[[Attempt], None],
        load: Callable[[ScoringModel, EngineConfig], Engine] = load_scoring_engine,
    ) -> None:
        self.task = task
        self.report = report
        self.commit = commit
        self.policy = ScoringPolicy(units, task.engine.batch, pool.max_workers, report)
        self.fleet = WorkerFleet(pool, load)
        self.checked_at = time.monotonic()

    def run(self) -> Iterator[Progress]:
        """Score all units; yield the progress after every change, and about once a second.

        Raises:
            UserError: a worker reports a user error, or workers cannot be placed or kept alive.
            OSError: a unit cannot be read or written.
        """
        check_places(self.fleet.pool)
        try:
            while not self.policy.finished:
                self._start_workers()
                self._assign_units()
                for event in self.fleet.results(POLL_SECONDS):
                    if isinstance(event, Death):
                        self._handle_death(event)
                    else:
                        self._handle_result(event)
                if time.monotonic() - self.checked_at >= POLL_SECONDS:
                    self.checked_at = time.monotonic()
                    self._check_workers()
                yield self._progress()
        finally:
            self.fleet.close()

    def _start_workers(self) -> None:
        engine = self.task.engine
        while self.policy.needs_worker():
            worker = self.policy.add_worker()
            if worker.batch_tokens < engine.batch:
                engine = engine.with_batch(worker.batch_tokens)
            self.fleet.start(worker, replace(self.task, engine=engine))

    def _assign_units(self) -> None:
        for worker in self.policy.workers:
            while unit := self.policy.next_unit(worker):
                self.fleet.assign(worker, unit)

    def _handle_death(self, death: Death) -> None:
        if death.out_of_memory:
            self.policy.halve_batch(death.worker, "Ray killed a worker")
        self._lose(death.worker, death.reason, caused_by_unit=not (death.out_of_memory or death.with_host))

    def _handle_result(self, result: CallResult) -> None:
        worker, unit, outcome = result.worker, result.unit, result.outcome
        if outcome.kind == "failed":
            assert outcome.error is not None
            if unit is not None or not self.policy.ready_workers:
                raise outcome.error from RuntimeError(outcome.trace)
            self._lose(worker, str(outcome.error))  # other machines could load the models, but not this one
        elif outcome.kind == "out_of_memory":
            self.policy.halve_batch(worker, outcome.reason)
            self.policy.release(worker)
            self.fleet.drop(worker)
        elif outcome.kind == "broken":
            self._lose(worker, outcome.reason)
        elif unit is None:
            self.policy.set_ready(worker)
        else:
            self.commit(unit.attempt)
            self.fleet.unit_done(worker)
            self.policy.complete(worker, unit, outcome.rejects)

    def _lose(self, worker: Worker, reason: str, caused_by_unit: bool = True) -> None:
        in_flight = None
        if caused_by_unit and worker.units and worker.units[0].one_by_one:  # its only unit
            in_flight = pop_note(self.task.output, worker.units[0].attempt)
        self.policy.lose(worker, reason, caused_by_unit, in_flight)
        self.fleet.drop(worker)

    def _check_workers(self) -> None:
        if not self.fleet.head_answers():
            return
        for worker, reason in self.fleet.stalled().items():
            self._lose(worker, reason)
        self.fleet.query_progress()
        self.fleet.check_placement(self.report)

    def _progress(self) -> Progress:
        policy, in_progress = self.policy, 0.0
        for worker in policy.workers:
            tokens = sum(unit.shard.tokens for unit in worker.units)
            sequences = sum(unit.shard.rows for unit in worker.units)
            expected = self.task.plan.computed_tokens(tokens, sequences)
            in_progress += tokens * min(1.0, self.fleet.computed_tokens(worker) / max(1.0, expected))
        return Progress(policy.units_done, policy.tokens_done + int(in_progress), policy.rejects, policy.ready_workers)
