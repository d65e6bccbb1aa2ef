"""The job: units go to workers until all are done, whatever happens to workers, nodes or memory on the way.

Workers are Ray actors. Only what became of a unit travels between them and the driver; the driver commits it. Every
worker has up to two units, one in its engines and one being read or written.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.exceptions import RayError

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig
from weighted_mtp.scoring.job.ray_cluster import Pool, cause_of_death, describe_nodes, head_answers, node_died
from weighted_mtp.scoring.job.scorer import ScoringTask, load_model
from weighted_mtp.scoring.job.units import Attempt, Suspect, commit, read_suspect
from weighted_mtp.scoring.job.worker import Outcome, ScoringWorker, Unit

UNITS_PER_WORKER = 2
POLL_SECONDS = 1.0
PLACES_SECONDS = 60.0
"""How long a job without a place for even one worker waits for nodes to come back."""
HEAD_SECONDS = 30.0
"""How long a job goes on while the head of the cluster does not answer; after 60 Ray would end the driver."""
STALLED_SECONDS = 1800.0
"""How long a worker with units may compute nothing before it counts as dead: processes hang, too."""
START_SECONDS = 4 * STALLED_SECONDS
"""How long a worker may take to load its models, downloads included."""
MOST_ASKED = 32
"""Workers that are asked in a second how far they are."""
CAREFUL_AFTER = 2
"""Workers that a unit may take down before its sequences are tried one by one."""
CONVICTED_AFTER = 2
"""Workers that a sequence tried alone may take down before it is given up."""
MOST_DEATHS = 8
"""Workers that a unit may take down with nobody knowing why, and sequences of it that may be given up like that."""
MOST_STARTS = 3
"""Workers that may die in a row while they load their models."""
LEAST_BATCH = 256


@dataclass(frozen=True)
class Progress:
    """Where a job stands: units and tokens done by it, the tokens including an estimate of the units under way."""

    units: int
    tokens: int
    rejects: int
    workers: int


@dataclass
class Trouble:
    """What is known about a unit that workers died of."""

    deaths: int = 0
    unexplained: int = 0
    suspects: Counter[Suspect] = field(default_factory=Counter)
    given_up: dict[Suspect, str] = field(default_factory=dict)


@dataclass(eq=False)
class Worker:
    """A worker as the driver sees it."""

    actor: Any
    batch_tokens: int
    ready: bool = False
    units: list[Unit] = field(default_factory=list)
    computed: int = 0
    computed_before: int = 0
    """Tokens that its engines had computed when its last unit was done."""
    moved_at: float = 0.0
    """When it was last seen to get on with its units, or first seen to run; 0 as long as it waits for a place."""
    asked_at: float = 0.0


@dataclass(frozen=True)
class Call:
    """A call under way. Without a unit it is the start of a worker, or asks for its progress."""

    worker: Worker
    unit: Unit | None = None
    progress: bool = False


class ScoringJob:
    """Scores units on the connected Ray cluster.

    Args:
        task: what to do with each of them.
        units: the shards to score.
        pool: how many workers, and what they take.
        report: called with one line about anything unusual.
        load: makes an engine; another than the default is for tests and measurements.
    """

    def __init__(
        self,
        task: ScoringTask,
        units: list[ShardEntry],
        pool: Pool,
        report: Callable[[str], None],
        load: Callable[[ScoringModel, EngineConfig], Engine] = load_model,
    ) -> None:
        self.task = task
        self.pool = pool
        self.report = report
        self.load = load
        self.pending = deque(units)
        self.trouble: dict[str, Trouble] = {}
        self.workers: list[Worker] = []
        self.calls: dict[Any, Call] = {}
        self.failed_starts = 0
        self.done = Progress(0, 0, 0, 0)
        self.looked_at = self.headed_at = self.placed_at = time.monotonic()

    def run(self) -> Iterator[Progress]:
        """Score all units; yield the progress after every change, and every second.

        Raises:
            UserError: what a worker says the user must put right, or workers that cannot be placed or kept alive.
            OSError: a unit cannot be read or written.
        """
        self.pool.check()
        actor = ray.remote(ScoringWorker)
        try:
            while self.pending or any(worker.units for worker in self.workers):
                self._start_workers(actor)
                self._hand_out()
                calls = list(self.calls)
                if ray.wait(calls, timeout=POLL_SECONDS)[0]:
                    calls, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
                else:
                    calls = []
                for ref in calls:
                    self._finish(ref)
                if time.monotonic() - self.looked_at >= POLL_SECONDS:
                    self._look_around()
                yield self._progress()
        finally:
            for worker in list(self.workers):
                self._drop(worker)

    def _start_workers(self, actor: Any) -> None:
        unfinished = len(self.pending) + sum(len(worker.units) for worker in self.workers)
        while len(self.workers) < min(self.pool.most, unfinished):
            handle = actor.options(
                num_cpus=self.pool.cpus,
                num_gpus=self.pool.gpus,
                max_restarts=0,
                max_concurrency=UNITS_PER_WORKER + 1,  # and a question about progress
                scheduling_strategy="SPREAD",
            ).remote(self.task, self.load)
            worker = Worker(handle, self.task.engine.batch)
            self.workers.append(worker)
            self.calls[handle.start.remote()] = Call(worker)

    def _hand_out(self) -> None:
        for worker in self.workers:
            while worker.ready and self.pending and self._may_have_more(worker):
                shard = self.pending.popleft()
                trouble = self.trouble.get(shard.name, Trouble())
                attempt = Attempt(shard.name, uuid4().hex[:12])
                unit = Unit(shard, attempt, trouble.deaths >= CAREFUL_AFTER, dict(trouble.given_up))
                worker.moved_at = time.monotonic() if not worker.units else worker.moved_at
                worker.units.append(unit)
                self.calls[worker.actor.score.remote(unit)] = Call(worker, unit)

    def _may_have_more(self, worker: Worker) -> bool:
        """A unit that takes down workers has one for itself, so that it takes down no other unit."""
        trouble = self.trouble.get(self.pending[0].name)
        alone = any(unit.careful for unit in worker.units) or (trouble and trouble.deaths >= CAREFUL_AFTER)
        return not worker.units if alone else len(worker.units) < UNITS_PER_WORKER

    def _finish(self, ref: Any) -> None:
        call = self.calls.pop(ref, None)
        if call is None:  # of a worker that is gone
            return
        try:
            result = ray.get(ref)
        except RayError as error:
            if isinstance(error, RayOutOfMemoryError):
                self._lower_batch(call.worker, "Ray ended a worker")
            innocent = isinstance(error, RayOutOfMemoryError) or node_died(error)
            self._lose(call.worker, cause_of_death(error), innocent)
            return
        if call.progress:
            # A worker that is loading answers, too: from its first answer on the clock runs.
            if result != call.worker.computed or not call.worker.moved_at:
                call.worker.moved_at = time.monotonic()
            call.worker.computed = result
        else:
            self._judge(call.worker, call.unit, result)

    def _judge(self, worker: Worker, unit: Unit | None, outcome: Outcome) -> None:
        """Act on how a unit, or the start of a worker, went."""
        if outcome.kind == "failed":
            assert outcome.error is not None
            if unit is None and any(other.ready for other in self.workers):
                self._lose(worker, str(outcome.error))  # what others could load, this machine cannot
                return
            raise outcome.error from RuntimeError(outcome.trace)
        if outcome.kind == "out_of_memory":
            self._lower_batch(worker, outcome.reason)
            self._requeue(worker)
        elif outcome.kind == "broken":
            self._lose(worker, outcome.reason)
        elif unit is None:
            worker.ready = True
            self.failed_starts = 0
        else:
            commit(self.task.output, unit.attempt)
            worker.units.remove(unit)
            worker.computed_before = worker.computed
            worker.moved_at = time.monotonic()
            self.trouble.pop(unit.shard.name, None)
            done = self.done
            self.done = replace(
                done,
                units=done.units + 1,
                tokens=done.tokens + unit.shard.tokens,
                rejects=done.rejects + outcome.rejects,
            )

    def _lower_batch(self, worker: Worker, reason: str) -> None:
        """Halve the batch of all workers that start from now on, unless that was done since this one started."""
        if worker.batch_tokens > self.task.engine.batch:
            return
        lower = worker.batch_tokens // 2
        if lower < LEAST_BATCH:
            raise UserError(
                f"out of memory even with {worker.batch_tokens} tokens at once ({reason}); use fewer --workers, "
                "a smaller --dtype, or a smaller model"
            )
        self.report(f"out of memory ({reason}): going on with batches of {lower} tokens")
        self.task = replace(self.task, engine=self.task.engine.with_batch(lower))

    def _lose(self, worker: Worker, reason: str, innocent: bool = False) -> None:
        """Deal with a worker that died or is of no use any more; if `innocent`, through no fault of its units."""
        if not worker.ready and not innocent:
            self._note_failed_start(reason)
        for unit in worker.units if not innocent else []:
            self._note_death(unit, reason)
        again = ", ".join(unit.shard.name for unit in worker.units)
        self.report(f"lost a worker ({reason})" + f"; scoring {again} again" * bool(again))
        self._requeue(worker)

    def _note_failed_start(self, reason: str) -> None:
        self.failed_starts += 1
        if self.failed_starts < MOST_STARTS:
            return
        ready = sum(worker.ready for worker in self.workers)
        if not ready:
            raise UserError(
                f"{MOST_STARTS} workers in a row did not come to load their models ({reason}); if memory ran out, "
                "lower --batch_tokens or --workers; rerunning the same command continues"
            )
        self.report(f"{MOST_STARTS} workers in a row could not start: going on with {ready}")
        self.pool = replace(self.pool, most=ready)
        self.failed_starts = 0

    def _note_death(self, unit: Unit, reason: str) -> None:
        trouble = self.trouble.setdefault(unit.shard.name, Trouble())
        trouble.deaths += 1
        if not unit.careful:
            return
        suspect = read_suspect(self.task.output, unit.attempt)
        if suspect is None:
            trouble.unexplained += 1
        else:
            trouble.suspects[suspect] += 1
            if trouble.suspects[suspect] >= CONVICTED_AFTER:
                trouble.given_up[suspect] = f"workers died of it: {reason}"
        if max(trouble.unexplained, len(trouble.given_up)) > MOST_DEATHS:
            raise UserError(
                f"{unit.shard.name}: {trouble.deaths} workers died of it ({reason}); if memory ran out, lower "
                "--batch_tokens or --workers; rerunning the same command continues"
            )

    def _requeue(self, worker: Worker) -> None:
        self.pending.extendleft(unit.shard for unit in reversed(worker.units))
        self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        ray.kill(worker.actor)
        self.workers.remove(worker)
        self.calls = {ref: call for ref, call in self.calls.items() if call.worker is not worker}

    def _look_around(self) -> None:
        """Ask busy workers how far they are, and see whether there are still a head and a place for a worker."""
        now = self.looked_at = time.monotonic()
        if head_answers():
            self.headed_at = now
        elif now - self.headed_at > HEAD_SECONDS:
            raise UserError(
                "the head of the Ray cluster does not answer any more; start it again and rerun the same command, "
                "which continues"
            )
        else:
            return
        for worker in list(self.workers):
            limit = STALLED_SECONDS if worker.ready else START_SECONDS
            busy = worker.units or not worker.ready
            if busy and worker.moved_at and now - worker.moved_at > limit:
                self._lose(worker, f"nothing came of it for {limit:g} seconds")
        self._ask_for_progress()
        if any(worker.moved_at for worker in self.workers):
            self.placed_at = now
        elif self.pool.places():
            if now - self.placed_at > PLACES_SECONDS:
                self.report(f"still waiting for {self.pool.needs()} that nothing else on the Ray cluster uses")
                self.placed_at = now
        elif now - self.placed_at > PLACES_SECONDS:
            raise UserError(
                f"no node of the Ray cluster ({describe_nodes()}) can hold a worker any more, which needs "
                f"{self.pool.needs()}; add nodes and rerun the same command, which continues"
            )

    def _ask_for_progress(self) -> None:
        """Ask workers how far they are, in turn: answers of a thousand at once would keep the driver busy."""
        asked = {call.worker for call in self.calls.values() if call.progress}
        others = [worker for worker in self.workers if worker not in asked]
        for worker in sorted(others, key=lambda worker: worker.asked_at)[:MOST_ASKED]:
            worker.asked_at = time.monotonic()
            self.calls[worker.actor.computed_tokens.remote()] = Call(worker, progress=True)

    def _progress(self) -> Progress:
        under_way = 0.0
        for worker in self.workers:
            tokens, sequences = (sum(getattr(unit.shard, of) for unit in worker.units) for of in ("tokens", "rows"))
            computed = worker.computed - worker.computed_before
            under_way += tokens * min(1.0, computed / max(1.0, self.task.plan.computed_tokens(tokens, sequences)))
        ready = sum(worker.ready for worker in self.workers)
        return replace(self.done, tokens=self.done.tokens + int(under_way), workers=ready)
