"""`wmtp train`: train on scored shards and print a summary."""

import os
from typing import Any

from accelerate import PartialState

from weighted_mtp.pipelines.reports.train_plan import print_plan
from weighted_mtp.pipelines.reports.train_summary import print_summary
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.interruption import Interruption
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.training.run.plan import check_memory, plan
from weighted_mtp.training.run.train import train


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train in this process or on Ray, print a one-screen summary, and return it.

    With `dry_run`, only print the plan in the first process, and return None.

    Raises:
        UserError: the run is not possible, or does not fit into the memory of its devices as planned.
    """
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            planned = plan(config, ProgressBar)
            print_plan(planned)
            check_memory(planned)
        return None
    if config.ray_workers:
        with Interruption(deferred=True):  # Ray takes seconds to import
            from weighted_mtp.pipelines.launchers.ray_train import train_on_ray

        summary = train_on_ray(config)
    else:
        summary = train(config, ProgressBar)
        if not PartialState().is_main_process:
            return summary
    print_summary(config, summary)
    return summary
