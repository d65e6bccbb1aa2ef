"""`wmtp train`: train on scored shards and say how it went."""

from typing import Any

from accelerate import PartialState

from weighted_mtp.pipelines.reports.train_summary import print_summary
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.run.train import train


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, here or on Ray, then print a one-screen summary; return what it summarises."""
    if config.ray_workers:
        from weighted_mtp.pipelines.ray_train import train_on_ray  # Ray takes seconds to import

        summary = train_on_ray(config)
    else:
        summary = train(config)
        if not PartialState().is_main_process:
            return summary
    print_summary(config, summary)
    return summary
