"""The table of held-out losses."""

import pytest

from weighted_mtp.pipelines.reports.evaluation_table import print_losses
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.training.evaluation import HeadLoss


def test_one_row_for_each_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [
        HeadLoss("1", 0.6931, 0.456, 12345),
        HeadLoss("top", 800.0, 0.0, 1),
        HeadLoss("phase_1", float("nan"), float("nan"), 0),
    ]
    print_losses(EvaluateConfig(model="run", input="held-out"), losses)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "run on held-out"
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")] == [
        ["offset 1", "0.6931", "2.00", "45.6%", "12,345"],
        ["token order", "800.0000", "inf", "0.0%", "1"],
        ["phase 1", "nan", "inf", "nan%", "0"],
    ]
