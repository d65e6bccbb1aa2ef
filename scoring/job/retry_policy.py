"""Decisions of the scoring job: which unit a worker gets, what a failure was due to, and when the job gives up.

Plain Python without Ray, clocks or files: the driver reports events, and decisions depend on nothing else.

A unit whose workers keep dying is scored one sequence at a time by a worker of its own. A sequence at which workers
keep dying is given up: it gets no scores. Running out of memory halves the batch of all workers that start later.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.units import SequenceKey, Unit, new_attempt

UNITS_PER_WORKER = 2
"""One in the engines and one being read or written."""
FAILURES_BEFORE_ONE_BY_ONE = 2
"""Workers that a unit may lose before its sequences are tried one by one."""
FAILURES_BEFORE_GIVING_UP = 2
"""Workers that a sequence tried alone may lose before it is given up."""
MAX_UNEXPLAINED_FAILURES = 8
"""Workers that a unit may lose between sequences, and sequences of it that may be given up, before the job stops."""
MAX_FAILED_STARTS = 3
"""Workers that may die in a row while they load their models."""
MIN_BATCH_TOKENS = 256


@dataclass
class UnitFailures:
    """Failures of a unit that lost workers.

    Attributes:
        workers: workers lost.
        unexplained: workers lost in one-by-one mode with no sequence in the engines.
        by_sequence: workers lost in one-by-one mode, by the sequence in the engines.
        given_up: sequences that are not tried again, and why.
    """

    workers: int = 0
    unexplained: int = 0
    by_sequence: Counter[SequenceKey] = field(default_factory=Counter)
    given_up: dict[SequenceKey, str] = field(default_factory=dict)

    @property
    def one_by_one(self) -> bool:
        """Whether the sequences of the unit are tried one by one."""
        return self.workers >= FAILURES_BEFORE_ONE_BY_ONE


@dataclass(eq=False)
class Worker:
    """A worker: the batch size that it started with, whether its models are loaded, and the units that it has."""

    batch_tokens: int
    ready: bool = False
    units: list[Unit] = field(default_factory=list)


class ScoringPolicy:
    """State and decisions of a job.

    Args:
        units: the shards to score.
        batch_tokens: tokens per engine batch at the start.
        max_workers: most workers at a time.
        report: called with one line about each incident.
    """

    def __init__(
        self, units: list[ShardEntry], batch_tokens: int, max_workers: int, report: Callable[[str], None]
    ) -> None:
        self.pending = deque(units)
        self.batch_tokens = batch_tokens
        self.max_workers = max_workers
        self.report = report
        self.workers: list[Worker] = []
        self.failures: dict[str, UnitFailures] = {}
        self.failed_starts = 0
        self.units_done = self.tokens_done = self.rejects = 0

    @property
    def finished(self) -> bool:
        """Whether every unit is done."""
        return not self.pending and not any(worker.units for worker in self.workers)

    @property
    def ready_workers(self) -> int:
        """Number of workers whose models are loaded."""
        return sum(worker.ready for worker in self.workers)

    def needs_worker(self) -> bool:
        """Whether another worker would have work and is allowed."""
        unfinished = len(self.pending) + sum(len(worker.units) for worker in self.workers)
        return len(self.workers) < min(self.max_workers, unfinished)

    def add_worker(self) -> Worker:
        """Register a worker that starts now, with the current batch size."""
        worker = Worker(self.batch_tokens)
        self.workers.append(worker)
        return worker

    def set_ready(self, worker: Worker) -> None:
        """The worker has loaded its models."""
        worker.ready = True
        self.failed_starts = 0

    def next_unit(self, worker: Worker) -> Unit | None:
        """Assign the next unit to a worker; None if the worker must wait.

        A unit in one-by-one mode is the only one of its worker, so that no other unit is lost with it.
        """
        if not worker.ready or not self.pending:
            return None
        failures = self.failures.get(self.pending[0].name, UnitFailures())
        alone = failures.one_by_one or any(unit.one_by_one for unit in worker.units)
        if len(worker.units) >= (1 if alone else UNITS_PER_WORKER):
            return None
        shard = self.pending.popleft()
        unit = Unit(shard, new_attempt(shard.name), failures.one_by_one, dict(failures.given_up))
        worker.units.append(unit)
        return unit

    def complete(self, worker: Worker, unit: Unit, rejects: int) -> None:
        """A unit is committed, with the number of its sequences that could not be scored."""
        worker.units.remove(unit)
        self.failures.pop(unit.shard.name, None)
        self.units_done += 1
        self.tokens_done += unit.shard.tokens
        self.rejects += rejects

    def halve_batch(self, worker: Worker, reason: str) -> None:
        """Halve the batch of workers that start from now on, unless that was done since this worker started.

        Raises:
            UserError: the batch would be too small.
        """
        if worker.batch_tokens > self.batch_tokens:
            return
        lower = worker.batch_tokens // 2
        if lower < MIN_BATCH_TOKENS:
            raise UserError(
                f"out of memory even with {worker.batch_tokens} tokens at once ({reason}); use fewer --workers, "
                "a smaller --dtype, or a smaller model"
            )
        self.report(f"out of memory ({reason}): going on with batches of {lower} tokens")
        self.batch_tokens = lower

    def lose(
        self, worker: Worker, reason: str, caused_by_unit: bool = True, in_flight: SequenceKey | None = None
    ) -> None:
        """A worker died or became useless: count the failure and queue its units again.

        Args:
            worker: the worker.
            reason: one line for the user.
            caused_by_unit: False if its node died or Ray ended it for its memory.
            in_flight: the sequence in its engines, if it scored one by one and noted one.

        Raises:
            UserError: too many workers failed at the same unit or while loading their models.
        """
        if caused_by_unit:
            if not worker.ready:
                self._count_failed_start(reason)
            for unit in worker.units:
                self._count_failure(unit, reason, in_flight)
        again = ", ".join(unit.shard.name for unit in worker.units)
        self.report(f"lost a worker ({reason})" + f"; scoring {again} again" * bool(again))
        self.release(worker)

    def release(self, worker: Worker) -> None:
        """Remove a worker and put its units in front of the queue, in their order."""
        self.pending.extendleft(unit.shard for unit in reversed(worker.units))
        self.workers.remove(worker)

    def _count_failed_start(self, reason: str) -> None:
        self.failed_starts += 1
        if self.failed_starts < MAX_FAILED_STARTS:
            return
        if not self.ready_workers:
            raise UserError(
                f"{MAX_FAILED_STARTS} workers in a row failed to load their models ({reason}); if memory ran "
                "out, lower --batch_tokens or --workers; rerunning the same command continues"
            )
        self.report(f"{MAX_FAILED_STARTS} workers in a row could not start: going on with {self.ready_workers}")
        self.max_workers = self.ready_workers
        self.failed_starts = 0

    def _count_failure(self, unit: Unit, reason: str, in_flight: SequenceKey | None) -> None:
        failures = self.failures.setdefault(unit.shard.name, UnitFailures())
        failures.workers += 1
        if not unit.one_by_one:
            return
        if in_flight is None:
            failures.unexplained += 1
        else:
            failures.by_sequence[in_flight] += 1
            if failures.by_sequence[in_flight] >= FAILURES_BEFORE_GIVING_UP:
                failures.given_up[in_flight] = f"workers died of it: {reason}"
        if max(failures.unexplained, len(failures.given_up)) > MAX_UNEXPLAINED_FAILURES:
            raise UserError(
                f"{unit.shard.name}: {failures.workers} workers died of it ({reason}); if memory ran out, lower "
                "--batch_tokens or --workers; rerunning the same command continues"
            )
