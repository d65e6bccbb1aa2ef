"""Contrasts of stored columns, subtracted by hand."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shard_files import read_shard

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Contrast
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.storage.files import DATA, PROGRESS
from weighted_mtp.scoring.conditions.plan import ScoringPlan
from weighted_mtp.scoring.engines.base import EngineConfig
from weighted_mtp.scoring.job.contrasts_only import subtract
from weighted_mtp.scoring.job.report import Progress, Report
from weighted_mtp.scoring.job.run import score_missing
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.units import commit, find_done
from weighted_mtp.scoring.job.worker_pool import WorkerPool


def test_a_run_that_lost_its_lock_commits_nothing(make_shard_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    source = make_shard_set([[1, 2, 3]], {"loss_a": [[np.nan, 2.0, 3.0]], "loss_b": [[np.nan, 1.5, 4.0]]})
    task = make_task(source, tmp_path / "output", {"a_b": Contrast(minuend="loss_a", subtrahend="loss_b")})
    pool = WorkerPool(max_workers=1, min_workers=1, cpus=1, gpus=0)
    with pytest.raises(UserError, match="another run has taken over its lock"):
        score_missing(task, source.manifest.shards, pool, Report(), held=lambda: False)
    assert not (task.output / DATA).exists()
    score_missing(task, source.manifest.shards, pool, Report(), held=lambda: True)
    assert find_done(task.output, source.manifest.shards) == {source.manifest.shards[0].name}


def make_task(source: ShardSet, output: Path, contrasts: dict[str, Contrast]) -> ScoringTask:
    (output / PROGRESS).mkdir(parents=True)
    engine = EngineConfig("transformers", None, "float32", batch_tokens=64, max_length=64, threads=1)
    return ScoringTask(source.reader, output, ScoringPlan({}, contrasts), engine, None)


def test_stored_columns_are_subtracted_shard_by_shard(make_shard_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    first = [[np.nan, 2.0, 3.0], [np.nan, 1.0], [np.nan, 5.0]]
    second = [[np.nan, 1.5, 4.0], [np.nan, np.nan], [np.nan, 5.0]]
    source = make_shard_set([[1, 2, 3], [4, 5], [6, 7]], {"loss_a": first, "loss_b": second})
    contrasts = {
        "a_b": Contrast(minuend="loss_a", subtrahend="loss_b"),
        "twice": Contrast(minuend="a_b", subtrahend="loss_b"),
    }
    output = tmp_path / "output"
    task = make_task(source, output, contrasts)
    shards = source.manifest.shards
    assert list(subtract(task, shards, partial(commit, output))) == [
        Progress(units=0, tokens=0, rejects=0, workers=1),
        Progress(units=1, tokens=5, rejects=0, workers=1),
        Progress(units=2, tokens=7, rejects=0, workers=1),
    ]
    assert find_done(output, shards) == {shard.name for shard in shards}
    tables = [read_shard(output / DATA / shard.name) for shard in shards]
    nan = np.nan
    for name, expected in (("a_b", [nan, 0.5, -1, nan, nan, nan, 0]), ("twice", [nan, -1, -5, nan, nan, nan, -5])):
        found = np.concatenate([flat_values(table[name]) for table in tables])
        np.testing.assert_array_equal(found, np.array(expected, np.float16))
