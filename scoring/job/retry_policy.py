"""Decisions of the scoring job: assigning units, attributing failures, and giving up.

Plain Python without Ray, clocks or files: decisions depend only on events reported by the driver.

A unit that keeps losing workers is scored one sequence at a time by a dedicated worker. A sequence that keeps losing
workers is given up: it gets no scores. Running out of memory halves the batch of all workers that start later.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.units import SequenceKey, Unit, new_attempt

UNITS_PER_WORKER = 2
"""One in the engines, the other being read or written."""
FAILURES_BEFORE_ONE_BY_ONE = 2
"""Lost workers after which the sequences of a unit are tried one by one."""
FAILURES_BEFORE_GIVING_UP = 2
"""Lost workers after which a sequence tried alone is given up."""
MAX_UNEXPLAINED_FAILURES = 8
"""Limit, for each unit, of workers lost between sequences and of sequences given up; the job stops above it."""
MAX_FAILED_STARTS = 3
"""Consecutive failed starts after which the job starts no more workers, or stops if it has none."""
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
    """A worker: its initial batch size, whether its models are loaded, and its units."""

    batch_tokens: int
    ready: bool = False
    units: list[Unit] = field(default_factory=list)


class ScoringPolicy:
    """State and decisions of a job.

    Args:
        units: the shards to score.
        batch_tokens: tokens per engine batch at the start.
        max_workers: maximum number of workers.
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
        """Whether another worker is allowed and would have work."""
        unfinished = len(self.pending) + sum(len(worker.units) for worker in self.workers)
        return len(self.workers) < min(self.max_workers, unfinished)

    def add_worker(self) -> Worker:
        """Register a worker that starts now, with the current batch size."""
        worker = Worker(self.batch_tokens)
        self.workers.append(worker)
        return worker

    def set_ready(self, worker: Worker) -> None:
        """Record that a worker has loaded its models."""
        worker.ready = True
        self.failed_starts = 0

    def next_unit(self, worker: Worker) -> Unit | None:
        """Assign the next unit to a worker; None if the worker must wait.

        A unit in one-by-one mode is its worker's only unit: no other unit is lost with it.
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
        """Record a committed unit and the number of its rejected sequences."""
        worker.units.remove(unit)
        self.failures.pop(unit.shard.name, None)
        self.units_done += 1
        self.tokens_done += unit.shard.tokens
        self.rejects += rejects

    def halve_batch(self, worker: Worker, reason: str) -> None:
        """Halve the batch of workers that start later, unless it was lowered since this worker started.

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
        self.report(f"out of memory ({reason}): continuing with batches of {lower} tokens")
        self.batch_tokens = lower

    def lose(
        self, worker: Worker, reason: str, caused_by_unit: bool = True, in_flight: SequenceKey | None = None
    ) -> None:
        """Remove a dead or useless worker: count the failure and requeue its units.

        Args:
            worker: the worker.
            reason: one line for the user.
            caused_by_unit: False if its node died or Ray killed it to free memory.
            in_flight: the sequence in its engines, if noted in one-by-one mode.

        Raises:
            UserError: too many workers failed on the same unit or while loading their models.
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
        """Remove a worker and return its units to the front of the queue, in order."""
        self.pending.extendleft(unit.shard for unit in reversed(worker.units))
        self.workers.remove(worker)

    def _count_failed_start(self, reason: str) -> None:
        self.failed_starts += 1
        if self.failed_starts < MAX_FAILED_STARTS:
            return
        if not self.ready_workers:
            raise UserError(
                f"{MAX_FAILED_STARTS} workers in a row failed to load their models ({reason}); if memory ran "
                "out, lower --batch_tokens or --workers, else try --dtype float32 or --engine transformers; rerunning "
                "the same command continues"
            )
        self.report(f"{MAX_FAILED_STARTS} workers in a row could not start: continuing with {self.ready_workers}")
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
                failures.given_up[in_flight] = f"workers died scoring it: {reason}"
        if max(failures.unexplained, len(failures.given_up)) > MAX_UNEXPLAINED_FAILURES:
            raise UserError(
                f"{unit.shard.name}: {failures.workers} workers died scoring it ({reason}); if memory ran out, lower "
                "--batch_tokens or --workers; rerunning the same command continues"
            )
