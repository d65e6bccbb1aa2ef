"""The table printed by `wmtp evaluate`."""

import math

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.pipelines.reports.train_summary import prediction_title
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.training.evaluation import HeadLoss


def print_losses(config: EvaluateConfig, losses: list[HeadLoss]) -> None:
    """Print one row for each prediction of the model."""
    columns = ("prediction", "loss (nats)", "perplexity", "accuracy", "targets")
    table = Table(*columns, title=f"{config.model} on {config.input}", title_justify="left")
    for head in losses:
        perplexity = math.exp(head.loss) if head.loss < 700 else math.inf
        accuracy = f"{head.accuracy:.1%}"
        table.add_row(
            prediction_title(head.prediction), f"{head.loss:.4f}", f"{perplexity:.2f}", accuracy, f"{head.targets:,}"
        )
    new_console().print(table)
