"""The table of held-out losses."""

import math

import pytest

from weighted_mtp.pipelines.reports.evaluation_table import print_evaluation
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.training.evaluation import HeadLoss
from weighted_mtp.training.run.evaluate import Evaluation

LOSSES = [
    HeadLoss("1", 0.6931, 0.456, 12345, 1200, 0.0123),
    HeadLoss("top", 800.0, 0.0, 7, 1, math.nan),
    HeadLoss("phase_1", math.nan, math.nan, 0, 0, math.nan),
]


def test_one_row_for_each_prediction_and_what_was_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(EvaluateConfig(model="run", input="held-out", max_tokens=20000), Evaluation(LOSSES, 2048, "run"))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "run on held-out"
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")] == [
        ["offset 1", "0.6931", "0.0123", "2.00", "45.6%", "12,345", "1,200"],
        ["token order", "800.0000", "-", "inf", "0.0%", "7", "1"],
        ["phase 1", "-", "-", "-", "-", "0", "0"],
    ]
    assert [line.strip() for line in lines[-2:]] == [
        "sequence length 2,048 (of the run); at most the first 20,000 tokens of the set",
        "no standard error: it needs finite losses of two documents",
    ]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("setting", "sequence length 64"),
        ("run", "sequence length 64 (of the run)"),
        ("set", "sequence length 64 (max_length of the set)"),
    ],
)
def test_the_origin_of_the_sequence_length(source: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = Evaluation(LOSSES[:1], 64, source)
    print_evaluation(EvaluateConfig(model="run", input="held-out"), evaluation)
    assert capsys.readouterr().out.splitlines()[-1].strip() == text
