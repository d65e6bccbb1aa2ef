"""Contrasts of stored columns only, without models, engines and workers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.report import Progress
from weighted_mtp.scoring.job.scorer import ScoringTask, ShardScorer, load_scoring_engine
from weighted_mtp.scoring.job.units import Attempt, new_attempt, write_unit


def subtract(task: ScoringTask, units: list[ShardEntry], commit: Callable[[Attempt], None]) -> Iterator[Progress]:
    """Score units sequentially in this process, for a plan of contrasts only, and `commit` each.

    Raises:
        UserError: a shard is damaged.
        OSError: a unit cannot be read or written.
    """
    scorer = ShardScorer(task, load_scoring_engine)
    progress = Progress(units=0, tokens=0, rejects=0, workers=1)
    yield progress
    for shard in units:
        started = time.monotonic()
        table = task.source.file(shard).read_hashed()
        read_seconds = time.monotonic() - started
        attempt = new_attempt(shard.name)
        write_unit(task.output, attempt, scorer.score(shard.name, table), task.plan.columns, read_seconds)
        commit(attempt)
        progress = replace(progress, units=progress.units + 1, tokens=progress.tokens + shard.tokens)
        yield progress
