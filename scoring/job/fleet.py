"""The Ray side of the scoring job: actors, their calls, and their timeouts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.exceptions import RayError

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig
from weighted_mtp.scoring.job.ray_cluster import cause_of_death, count_places, describe_nodes, head_answers, host_lost
from weighted_mtp.scoring.job.retry_policy import UNITS_PER_WORKER, Worker
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.units import Unit
from weighted_mtp.scoring.job.worker import Outcome, ScoringWorker
from weighted_mtp.scoring.job.worker_pool import WorkerPool

PLACEMENT_SECONDS = 60.0
"""Longest wait for nodes when no node can hold a worker."""
HEAD_SECONDS = 30.0
"""Longest wait for an answer from the head of the cluster; after 60 seconds Ray would end the driver."""
STALLED_SECONDS = 1800.0
"""Longest time without progress before a worker with units counts as dead: processes may hang."""
START_SECONDS = 4 * STALLED_SECONDS
"""Longest time for a worker to load its models, including downloads."""
QUERIES_PER_CHECK = 32
"""Workers queried for progress at a time: a thousand answers at once would keep the driver busy."""


@dataclass
class Actor:
    """The Ray actor of a worker.

    Attributes:
        handle: the actor.
        computed: tokens computed by its engines, as of its last answer.
        computed_before: `computed` when its last unit was done.
        progress_at: time of last observed progress; 0 until the actor runs.
        queried_at: time of the last query for its progress.
    """

    handle: Any
    computed: int = 0
    computed_before: int = 0
    progress_at: float = 0.0
    queried_at: float = 0.0


@dataclass(frozen=True)
class PendingCall:
    """A call in progress: a unit, a query for progress, or, without either, the start of the worker."""

    worker: Worker
    unit: Unit | None = None
    query: bool = False


@dataclass(frozen=True)
class CallResult:
    """The outcome of a unit, or, without a unit, of the start of a worker."""

    worker: Worker
    unit: Unit | None
    outcome: Outcome


@dataclass(frozen=True)
class Death:
    """A worker died on its own, Ray killed it to free memory, or its node or the connection to it was lost."""

    worker: Worker
    reason: str
    with_host: bool
    out_of_memory: bool


class WorkerFleet:
    """Ray actors of the workers of one job, on the connected cluster.

    Args:
        pool: resources of a worker.
        load: creates an engine.
    """

    def __init__(self, pool: WorkerPool, load: Callable[[ScoringModel, EngineConfig], Engine]) -> None:
        self.pool = pool
        self.load = load
        self.actor_class = ray.remote(ScoringWorker)
        self.actors: dict[Worker, Actor] = {}
        self.calls: dict[Any, PendingCall] = {}
        self.head_seen_at = self.placed_at = time.monotonic()

    def start(self, worker: Worker, task: ScoringTask) -> None:
        """Start the actor of a worker and load its models."""
        handle = self.actor_class.options(
            num_cpus=self.pool.cpus,
            num_gpus=self.pool.gpus,
            max_restarts=0,
            max_concurrency=UNITS_PER_WORKER + 1,  # and a query for progress
            scheduling_strategy="SPREAD",
        ).remote(task, self.load)
        self.actors[worker] = Actor(handle)
        self.calls[handle.start.remote()] = PendingCall(worker)

    def assign(self, worker: Worker, unit: Unit) -> None:
        """Send a unit to a worker; start the clock of an idle worker."""
        actor = self.actors[worker]
        if len(worker.units) == 1:
            actor.progress_at = time.monotonic()
        self.calls[actor.handle.score.remote(unit)] = PendingCall(worker, unit)

    def results(self, timeout: float) -> Iterator[CallResult | Death]:
        """Wait up to `timeout` seconds for a call to end; yield the results of all finished calls.

        Skips calls of workers dropped meanwhile. Answers to queries only update the clocks.
        """
        refs = list(self.calls)
        if not ray.wait(refs, timeout=timeout)[0]:
            return
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            call = self.calls.pop(ref, None)
            if call is None:
                continue
            try:
                answer = ray.get(ref)
            except RayError as error:
                memory = isinstance(error, RayOutOfMemoryError)
                yield Death(call.worker, cause_of_death(error), host_lost(error), memory)
                continue
            if call.query:
                self._note_progress(self.actors[call.worker], answer)
            else:
                yield CallResult(call.worker, call.unit, answer)

    def _note_progress(self, actor: Actor, computed: int) -> None:
        # Workers answer while they load their models: the first answer starts the clock.
        if computed != actor.computed or not actor.progress_at:
            actor.progress_at = time.monotonic()
        actor.computed = computed

    def unit_done(self, worker: Worker) -> None:
        """Start the clock and the token count of the worker's next unit."""
        actor = self.actors[worker]
        actor.computed_before = actor.computed
        actor.progress_at = time.monotonic()

    def computed_tokens(self, worker: Worker) -> int:
        """Tokens computed by a worker's engines since its last unit was done, as of its last answer."""
        actor = self.actors[worker]
        return actor.computed - actor.computed_before

    def drop(self, worker: Worker) -> None:
        """Kill the actor of a worker and forget its calls."""
        ray.kill(self.actors.pop(worker).handle)
        self.calls = {ref: call for ref, call in self.calls.items() if call.worker is not worker}

    def close(self) -> None:
        """Kill all actors."""
        for worker in list(self.actors):
            self.drop(worker)

    def head_answers(self) -> bool:
        """Whether the head of the cluster answers.

        Raises:
            UserError: it has not answered for `HEAD_SECONDS`.
        """
        if head_answers():
            self.head_seen_at = time.monotonic()
            return True
        if time.monotonic() - self.head_seen_at > HEAD_SECONDS:
            raise UserError(
                "the head of the Ray cluster no longer answers; restart it and rerun the same command to continue"
            )
        return False

    def stalled(self) -> dict[Worker, str]:
        """Workers without progress for too long, and the reason in words."""
        stalled: dict[Worker, str] = {}
        for worker, actor in self.actors.items():
            seconds = time.monotonic() - actor.progress_at if actor.progress_at else 0.0
            if not worker.ready and seconds > START_SECONDS:
                stalled[worker] = f"it did not load its models within {START_SECONDS:g} seconds"
            elif worker.ready and worker.units and seconds > STALLED_SECONDS:
                stalled[worker] = f"it computed nothing for {STALLED_SECONDS:g} seconds"
        return stalled

    def query_progress(self) -> None:
        """Query the progress of the workers with the oldest queries."""
        queried = {call.worker for call in self.calls.values() if call.query}
        actors = [(worker, actor) for worker, actor in self.actors.items() if worker not in queried]
        for worker, actor in sorted(actors, key=lambda pair: pair[1].queried_at)[:QUERIES_PER_CHECK]:
            actor.queried_at = time.monotonic()
            self.calls[actor.handle.computed_tokens.remote()] = PendingCall(worker, query=True)

    def check_placement(self, report: Callable[[str], None]) -> None:
        """Report a job whose workers all wait for resources used by others.

        Raises:
            UserError: no node could hold a worker for `PLACEMENT_SECONDS`.
        """
        now = time.monotonic()
        if any(actor.progress_at for actor in self.actors.values()):
            self.placed_at = now
        elif count_places(self.pool):
            if now - self.placed_at > PLACEMENT_SECONDS:
                report(f"still waiting for {self.pool.needs()} to become free on the Ray cluster")
                self.placed_at = now
        elif now - self.placed_at > PLACEMENT_SECONDS:
            raise UserError(
                f"no node of the Ray cluster ({describe_nodes()}) can hold a worker any more; each needs "
                f"{self.pool.needs()}; add nodes and rerun the same command to continue"
            )
