"""Stage one as a function: token shards to scored shards.

The same call continues a stopped run and leaves a finished one unchanged.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import ray

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, find_finished
from weighted_mtp.schemas.storage.claims import check_claim, claim_output
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files
from weighted_mtp.schemas.storage.locations import remove_tree
from weighted_mtp.schemas.storage.locks import check_held, exclusive
from weighted_mtp.scoring.job.contrasts_only import subtract
from weighted_mtp.scoring.job.driver import ScoringJob
from weighted_mtp.scoring.job.finish import finish
from weighted_mtp.scoring.job.ray_cluster import ray_session
from weighted_mtp.scoring.job.report import DryRun, Report
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.scoring.job.setup import check_inputs, set_up
from weighted_mtp.scoring.job.units import Attempt, clear_attempts, commit, find_done
from weighted_mtp.scoring.job.worker_pool import WorkerPool


def score(config: ScoreConfig, report: Report | None = None) -> ShardSet:
    """Score a shard set.

    Args:
        config: the settings of `wmtp score`; `dry_run` is ignored, see `dry_run`.
        report: receives warnings, progress and incidents; by default the first and last are logged.

    Raises:
        UserError: the input, a model, the output or the machine is unsuitable.
        OSError: a shard cannot be read or written.
    """
    report = report or Report()
    inputs = check_inputs(config, report.warning)
    with exclusive(config.output) as held, cluster(config.ray_address):
        run = set_up(config, inputs)
        if finished := find_finished(run.output, run.request):
            report.already_complete(finished)
            return finished
        if not claim_output(run.output, run.request):
            remove_tree(run.output / TOKENIZER)  # left by an earlier claim without finished work
        clear_attempts(run.output)
        copy_files(run.source.tokenizer_path, run.output / TOKENIZER)
        score_missing(run.task, run.source.manifest.shards, run.pool, report, held)
        check_held(run.output, held)
        return finish(run.output, run.source, run.origins, run.request)


def dry_run(config: ScoreConfig, report: Report) -> DryRun | None:
    """Run all checks of `score` without writing anything; None if the set is complete.

    Raises:
        UserError: as for `score`.
    """
    inputs = check_inputs(config, report.warning)
    with cluster(config.ray_address):
        run = set_up(config, inputs)
        if finished := find_finished(run.output, run.request):
            report.already_complete(finished)
            return None
        check_claim(run.output, run.request)
        return DryRun(run.output, run.source, run.plan, find_done(run.output, run.source.manifest.shards))


def cluster(address: str | None) -> AbstractContextManager[None]:
    """The connection to the Ray cluster at `address`, or nothing."""
    return ray_session(address) if address else nullcontext()


def score_missing(
    task: ScoringTask, shards: list[ShardEntry], pool: WorkerPool, report: Report, held: Callable[[], bool]
) -> None:
    """Score the shards that are not done yet, on the connected Ray cluster or a new local one.

    Raises:
        UserError: `held` says that this process no longer holds the lock of the output.
    """
    done = find_done(task.output, shards)
    missing = [shard for shard in shards if shard.name not in done]
    needs_ray = bool(task.plan.models) or ray.is_initialized()  # contrasts of stored columns need no engines
    pool = pool.for_units(len(missing) if needs_ray else 1)
    report.start(shards, done, pool.max_workers)
    if not missing:
        return

    def commit_unit(attempt: Attempt) -> None:
        check_held(task.output, held)
        commit(task.output, attempt)

    with ray_session(None, pool) if needs_ray else nullcontext():
        if needs_ray:
            job = ScoringJob(task, missing, pool, report.incident, commit_unit).run()
        else:
            job = subtract(task, missing, commit_unit)
        for progress in job:
            report.progress(progress)
