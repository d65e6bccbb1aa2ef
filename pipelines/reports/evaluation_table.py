"""The table printed by `wmtp evaluate`."""

import math

from rich.table import Table

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.pipelines.reports.train_summary import formatted, prediction_title
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.training.run.evaluate import Evaluation

LENGTH_SOURCES = {"setting": "", "run": " (of the run)", "set": " (max_length of the set)"}


def print_evaluation(config: EvaluateConfig, evaluation: Evaluation) -> None:
    """Print one row for each prediction of the model, and what was evaluated."""
    table = Table(title=f"{config.model} on {config.input}", title_justify="left", caption_justify="left")
    for column in ("prediction", "loss (nats)", "std. error", "perplexity", "accuracy", "targets", "documents"):
        table.add_column(column)
    for head in evaluation.losses:
        table.add_row(
            prediction_title(head.prediction),
            formatted(head.loss, ".4f"),
            formatted(head.standard_error, ".4f"),
            formatted(math.exp(head.loss) if head.loss < 700 else head.loss * math.inf, ".2f"),
            formatted(head.accuracy, ".1%"),
            f"{head.targets:,}",
            f"{head.documents:,}",
        )
    limit = f"; at most the first {config.max_tokens:,} tokens of the set" if config.max_tokens else ""
    table.caption = f"sequence length {evaluation.sequence_length:,}{LENGTH_SOURCES[evaluation.length_source]}{limit}"
    if any(head.targets and math.isnan(head.standard_error) for head in evaluation.losses):
        table.caption += "\nno standard error: it needs finite losses of two documents"
    new_console().print(table)
