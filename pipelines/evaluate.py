"""`wmtp evaluate`: held-out loss of every head of a trained model."""

from weighted_mtp.pipelines.reports.evaluation_table import print_losses
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.training.evaluation import HeadLoss
from weighted_mtp.training.run.evaluate import evaluate


def run(config: EvaluateConfig) -> list[HeadLoss]:
    """Evaluate, print a table, and return the loss of every head."""
    losses = evaluate(config, ProgressBar)
    print_losses(config, losses)
    return losses
