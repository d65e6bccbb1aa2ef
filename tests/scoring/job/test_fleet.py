"""The clocks of a fleet; its actors are tested with Ray in `test_driver.py`."""

import time

import pytest

from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.fleet import STALLED_SECONDS, START_SECONDS, Actor, WorkerFleet
from weighted_mtp.scoring.job.retry_policy import Worker
from weighted_mtp.scoring.job.scorer import load_scoring_engine
from weighted_mtp.scoring.job.units import Unit, new_attempt
from weighted_mtp.scoring.job.worker_pool import WorkerPool

SHARD = ShardEntry(
    name="a", rows=1, tokens=1, longest=1, row_groups=1, bytes=1, sha256="0" * 64, footer_sha256="0" * 64
)
LONG_AGO, TOO_LONG_AGO = STALLED_SECONDS - 60, STALLED_SECONDS + 60


@pytest.fixture
def fleet() -> WorkerFleet:
    return WorkerFleet(WorkerPool(max_workers=1, min_workers=1, cpus=1, gpus=0), load_scoring_engine)


@pytest.mark.parametrize(
    ("ready", "has_unit", "seconds", "reason"),
    [
        (True, True, TOO_LONG_AGO, f"it computed nothing for {STALLED_SECONDS:g} seconds"),
        (True, True, LONG_AGO, None),
        (True, False, TOO_LONG_AGO, None),
        (False, False, TOO_LONG_AGO, None),
        (False, False, START_SECONDS + 60, f"it did not load its models within {START_SECONDS:g} seconds"),
    ],
)
def test_a_worker_stalls_while_it_has_work_or_loads(
    fleet: WorkerFleet, ready: bool, has_unit: bool, seconds: float, reason: str | None
) -> None:
    worker = Worker(64, ready, [Unit(SHARD, new_attempt("a"))] if has_unit else [])
    fleet.actors[worker] = Actor(None, progress_at=time.monotonic() - seconds)
    assert fleet.stalled() == ({worker: reason} if reason else {})


def test_a_worker_that_has_not_run_yet_is_not_stalled(fleet: WorkerFleet) -> None:
    fleet.actors[Worker(64)] = Actor(None)
    assert fleet.stalled() == {}


def test_tokens_count_from_the_last_unit(fleet: WorkerFleet) -> None:
    worker = Worker(64)
    fleet.actors[worker] = actor = Actor(None)
    fleet._note_progress(actor, 0)
    assert actor.progress_at > 0, "the first answer starts the clock"
    fleet._note_progress(actor, 30)
    assert fleet.computed_tokens(worker) == 30
    fleet.unit_done(worker)
    assert fleet.computed_tokens(worker) == 0
    seen = actor.progress_at
    fleet._note_progress(actor, 30)
    assert actor.progress_at == seen, "nothing was computed meanwhile"
    fleet._note_progress(actor, 37)
    assert fleet.computed_tokens(worker) == 7
    assert actor.progress_at > seen
