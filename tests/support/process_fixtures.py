"""Clean processes, and scoring without Ray.

Fixtures import what needs torch: the process that distributes the tests does not.
"""

import os
import pickle
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import pytest

from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.units import Unit, commit, find_done, new_attempt

if TYPE_CHECKING:
    from weighted_mtp.scoring.job.scorer import ScoringTask

PRELOADED = [
    "weighted_mtp.training.run.train",
    "weighted_mtp.pipelines.prepare",
    "s3fs",
    "pandas",
    "transformers.models.llama.modeling_llama",
]
OWN_ENVIRONMENT = "import os\nos.environ.clear()\nos.environ.update(environment)\n"


@pytest.fixture(scope="session")
def start_process() -> Callable[..., BaseProcess]:
    """`start_process(script, environment=None, **variables)` runs a script with global variables in a clean process.

    `environment` is added to the environment of this process. Slow imports are preloaded.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(script: str, environment: dict[str, str] | None = None, **variables: object) -> BaseProcess:
        variables["environment"] = {**os.environ, **(environment or {})}
        process = context.Process(target=exec, args=(OWN_ENVIRONMENT + script, variables), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def score_in_process() -> Callable[..., None]:
    """A replacement for `score_missing` with its worker in this process, because Ray takes seconds to start one.

    The worker loads engines with `load`.
    """
    from weighted_mtp.scoring.job.scorer import load_scoring_engine
    from weighted_mtp.scoring.job.worker import ScoringWorker

    def score(task: "ScoringTask", shards: list[ShardEntry], *_: object, load: Callable = load_scoring_engine) -> None:
        worker = ScoringWorker(pickle.loads(pickle.dumps(task)), load)
        done = find_done(task.output, shards)
        units = [Unit(shard, new_attempt(shard.name)) for shard in shards if shard.name not in done]
        for outcome in [worker.start(), *map(worker.score, units)]:
            if outcome.error:
                raise outcome.error
            assert outcome.kind == "done"
        for unit in units:
            commit(task.output, unit.attempt)

    return score


@pytest.fixture
def score_here(score_in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> "list[ScoringTask]":
    """Run the worker of `wmtp score` in this process; returns the list of its tasks."""
    tasks: list[ScoringTask] = []

    def score(task: "ScoringTask", *rest: object) -> None:
        tasks.append(task)
        score_in_process(task, *rest)

    monkeypatch.setattr("weighted_mtp.scoring.job.run.score_missing", score)
    return tasks
