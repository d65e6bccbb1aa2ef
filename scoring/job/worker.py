"""A worker: a process that holds the engines and scores one shard after another.

It may be given two shards at once. One is in the engines while the other is written, or the next one read; no more than
these two are in memory.
"""

import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shards import read_shard
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig
from weighted_mtp.scoring.job.faults import BrokenEngineError, OutOfMemoryError, reason_for
from weighted_mtp.scoring.job.scorer import Caution, ScoringTask, ShardScorer, write_unit
from weighted_mtp.scoring.job.units import Attempt, Suspect, note_suspect


@dataclass(frozen=True)
class Unit:
    """A shard to score.

    `careful` asks for one sequence at a time, each noted before it is tried; `given_up` are sequences that workers died
    of, with what is said about them.
    """

    shard: ShardEntry
    attempt: Attempt
    careful: bool = False
    given_up: dict[Suspect, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a unit, or the start of a worker, went.

    After `failed` the run must stop with `error`; `out_of_memory` asks for a smaller batch and `broken` for another
    worker, both for the reason given. `trace` is the worker's traceback.
    """

    kind: Literal["done", "failed", "out_of_memory", "broken"]
    rejects: int = 0
    reason: str = ""
    error: Exception | None = None
    trace: str = ""


class ScoringWorker:
    """The Ray actor.

    Failures are returned, not raised: Ray would wrap them and print pages.
    """

    def __init__(self, task: ScoringTask, load: Callable[[ScoringModel, EngineConfig], Engine]) -> None:
        self.task = task
        self.load = load
        # CUDA keeps its current device and stream for each thread: engines live and work in one.
        self.engine_thread = ThreadPoolExecutor(1)
        self.scorer: ShardScorer | None = None

    def start(self) -> Outcome:
        """Load the engines."""
        return outcome_of(self._start, "loading models")

    def score(self, unit: Unit) -> Outcome:
        """Score a shard and leave it, with its record, where the driver expects it."""
        return outcome_of(lambda: self._score(unit), f"scoring {unit.shard.name}")

    def computed_tokens(self) -> int:
        """Tokens that the engines have computed since the worker was started."""
        return self.scorer.computed_tokens if self.scorer else 0

    def _start(self) -> Outcome:
        self.scorer = self.engine_thread.submit(ShardScorer, self.task, self.load).result()
        return Outcome("done")

    def _score(self, unit: Unit) -> Outcome:
        assert self.scorer is not None
        started = time.monotonic()
        table = read_shard(self.task.source / unit.shard.name)
        read_seconds = time.monotonic() - started
        caution = None
        if unit.careful:
            caution = Caution(unit.given_up, partial(note_suspect, self.task.output, unit.attempt))
        scored = self.engine_thread.submit(self.scorer.score, unit.shard.name, table, caution).result()
        unit.attempt.note(self.task.output).unlink(missing_ok=True)  # from here on it is no sequence's fault
        write_unit(self.task, unit.attempt, scored, read_seconds)
        return Outcome("done", rejects=len(scored.rejects))


def outcome_of(job: Callable[[], Outcome], doing: str) -> Outcome:
    """Run a job; what it raises becomes an outcome."""
    try:
        return job()
    except OutOfMemoryError as error:
        return Outcome("out_of_memory", reason=str(error))
    except BrokenEngineError as error:
        return Outcome("broken", reason=str(error))
    except (UserError, OSError) as error:
        return Outcome("failed", error=error, trace=traceback.format_exc())
    except Exception as error:
        return Outcome(
            "failed",
            error=UserError(f"{doing} failed: {reason_for(error)}; rerunning the same command continues"),
            trace=traceback.format_exc(),
        )
