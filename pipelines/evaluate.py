"""`wmtp evaluate`: held-out loss of every head of a trained model."""

from accelerate import PartialState

from weighted_mtp.pipelines.reports.evaluation_table import print_evaluation
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.training.run.evaluate import Evaluation, evaluate


def run(config: EvaluateConfig) -> Evaluation:
    """Evaluate, print a table in the main process, and return the results."""
    evaluation = evaluate(config, ProgressBar)
    if PartialState().is_main_process:
        print_evaluation(config, evaluation)
    return evaluation
