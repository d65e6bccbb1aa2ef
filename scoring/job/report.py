"""Events of a scoring run, for callers that show progress and messages."""

import logging
from dataclasses import dataclass

from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.conditions.plan import ScoringPlan

logger = logging.getLogger("weighted_mtp")


@dataclass(frozen=True)
class Progress:
    """State of a job, without the units that earlier runs completed.

    Attributes:
        units: units completed.
        tokens: tokens scored, including an estimate for the units in progress.
        rejects: sequences that could not be scored.
        workers: workers with loaded models.
    """

    units: int
    tokens: int
    rejects: int
    workers: int


@dataclass(frozen=True)
class DryRun:
    """A run that was checked but not started: the columns to compute, and the names of completed shards."""

    output: Location
    source: ShardSet
    plan: ScoringPlan
    done: set[str]


class Report:
    """Receives the events of a scoring run; this base class logs warnings and incidents, and ignores the rest."""

    def warning(self, message: str) -> None:
        """A setting may have an unwanted consequence."""
        logger.warning(message)

    def already_complete(self, shards: ShardSet) -> None:
        """The output holds the finished set; nothing is left to do."""

    def start(self, shards: list[ShardEntry], done: set[str], max_workers: int) -> None:
        """Scoring starts: all shards, the names of those already completed, and the maximum number of workers."""

    def progress(self, progress: Progress) -> None:
        """The progress, after every change and about once a second."""

    def incident(self, message: str) -> None:
        """A worker was lost, memory ran out, or the job waits for resources."""
        logger.warning(message)
