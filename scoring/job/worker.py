"""A worker: a process that holds the engines and scores shards.

It may have two units at once: while one is in the engines, the other is read, prepared, completed or written, or waits
for the engines. No more are in memory.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.engines.base import Engine, EngineConfig
from weighted_mtp.scoring.job.faults import BrokenEngineError, OutOfMemoryError, reason_for
from weighted_mtp.scoring.job.scorer import OneByOne, ScoringTask, ShardScorer
from weighted_mtp.scoring.job.units import Unit, note_sequence, write_unit


@dataclass(frozen=True)
class Outcome:
    """Result of a unit, or of the start of a worker.

    Attributes:
        kind: `failed` must stop the run, `out_of_memory` needs a smaller batch, `broken` another worker.
        rejects: number of sequences that could not be scored.
        reason: one line, for `out_of_memory` and `broken`.
        error: the exception, for `failed`.
        trace: the worker's traceback, for `failed`.
    """

    kind: Literal["done", "failed", "out_of_memory", "broken"]
    rejects: int = 0
    reason: str = ""
    error: Exception | None = None
    trace: str = ""


class ScoringWorker:
    """The Ray actor.

    It returns failures instead of raising them: Ray would wrap them and print long tracebacks.
    """

    def __init__(self, task: ScoringTask, load: Callable[[ScoringModel, EngineConfig], Engine]) -> None:
        self.task = task
        self.load = load
        self.scorer: ShardScorer | None = None

    def start(self) -> Outcome:
        """Load the engines."""
        return outcome_of(self._start, "loading models")

    def score(self, unit: Unit) -> Outcome:
        """Score a shard and write it, with its record, under the names of the attempt."""
        return outcome_of(lambda: self._score(unit), f"scoring {unit.shard.name}")

    def computed_tokens(self) -> int:
        """Tokens computed by the engines since the start of the worker."""
        return self.scorer.computed_tokens if self.scorer else 0

    def _start(self) -> Outcome:
        self.scorer = ShardScorer(self.task, self.load)
        return Outcome("done")

    def _score(self, unit: Unit) -> Outcome:
        assert self.scorer is not None
        started = time.monotonic()
        table = self.task.source.file(unit.shard).read_hashed()
        read_seconds = time.monotonic() - started
        one_by_one = None
        if unit.one_by_one:
            one_by_one = OneByOne(unit.given_up, partial(note_sequence, self.task.output, unit.attempt))
        scored = self.scorer.score(unit.shard.name, table, one_by_one)
        unit.attempt.note(self.task.output).unlink(missing_ok=True)  # failures from here on are not due to a sequence
        write_unit(self.task.output, unit.attempt, scored, self.task.plan.columns, read_seconds)
        return Outcome("done", rejects=len(scored.rejects))


def outcome_of(job: Callable[[], Outcome], doing: str) -> Outcome:
    """Run a job and turn exceptions into outcomes."""
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
