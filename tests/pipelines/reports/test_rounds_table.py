"""Records of rounds, and the table of them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from weighted_mtp.pipelines.reports.rounds_table import describe_round, print_rounds
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

RECORD = {
    "round": 1,
    "set": "scored",
    "set_digest": "0123456789",
    "reference_fingerprint": "abcdefghij",
    "run": "first",
    "weights": "abs(x)",
    "steps": 7,
    "selected_share": 0.6,
    "eval_loss_1": 2.5,
}


def test_the_record_of_a_round(make_shard_set: Callable[..., ShardSet]) -> None:
    scored = make_shard_set([[1, 2]])
    training = TrainConfig(input=scored.path, model="m", output="run", weights={"formula": "abs(x)"})
    summary = {"steps": 7, "selected_share": math.nan, "eval_loss_1": 2.5, "eval_loss_2": math.nan, "seconds": 1.0}
    assert describe_round(3, scored, "fingerprint", training, summary) == {
        "round": 3,
        "set": str(scored.path),
        "set_digest": scored.manifest.digest,
        "reference_fingerprint": "fingerprint",
        "run": str(Path("run")),
        "weights": "abs(x)",
        "steps": 7,
        "selected_share": None,
        "eval_loss_1": 2.5,
        "eval_loss_2": None,
    }


def test_one_row_for_each_round_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The second run had no logged share and no held-out set. Runs of earlier versions have no standard errors."""
    second = {name: value for name, value in RECORD.items() if name != "eval_loss_1"}
    first = RECORD | {"eval_standard_error_1": 0.0125}
    print_rounds([first, second | {"round": 2, "run": "second", "selected_share": None}, RECORD | {"round": 3}])
    *lines, following = capsys.readouterr().out.splitlines()
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")] == [
        ["1", "01234567", "abcdefgh", "abs(x)", "60.0%", "2.5000 ± 0.0125"],
        ["2", "01234567", "abcdefgh", "abs(x)", "-", "-"],
        ["3", "01234567", "abcdefgh", "abs(x)", "60.0%", "2.5000"],
    ]
    assert following == "next: wmtp evaluate --model first --input SET"
