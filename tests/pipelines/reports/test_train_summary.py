"""The screen at the end of a training run, for a summary made by hand."""

import math
from typing import Any

import pytest

from weighted_mtp.pipelines.reports.train_summary import prediction_title, print_summary
from weighted_mtp.schemas.configs import TrainConfig

SUMMARY = {
    "steps": 1200,
    "tokens": 34567,
    "seconds": 12.34,
    "tokens_per_second": 2801.2,
    "loss": 2.5,
    "selected_share": 0.25,
    "bad_steps": 0,
    "no_signal_steps": 3,
    "eval_loss_1": 1.5,
    "eval_accuracy_1": 0.5,
    "memory_gib": 1.234,
}


def printed(capsys: pytest.CaptureFixture[str], config: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """The printed rows, and the title under the name `title`."""
    print_summary(TrainConfig(**{"input": "set", "model": "m", "output": "run"} | config), SUMMARY | summary)
    title, *lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("│").split("│") for line in lines if line.count("│") == 3]
    return {"title": title.strip()} | {name.strip(): value.strip() for name, value in rows}


def test_numbers_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, {"heads": {"offsets": (1, 2)}}, {}) == {
        "title": "run: trained",
        "steps": "1,200",
        "tokens": "34,567",
        "time": "12.3 s, 2,801 tokens/s",
        "weights": "1",
        "last logged loss, sum over 2 offsets": "2.5000",
        "targets with weight": "25.0%",
        "steps without signal": "3",
        "held-out, offset 1": "1.5000 nats, 50.0% right",
        "peak memory": "1.23 GiB",
        "trunk (Hugging Face)": "run/model",
        "heads": "run/heads",
        "metrics": "run/metrics.jsonl",
        "next": "wmtp evaluate --model run --input SET",
    }


def test_the_next_command_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, {"output": "my run"}, {})["next"] == "wmtp evaluate --model 'my run' --input SET"


def test_steps_after_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, {}, {"continued_steps": 200})["steps"] == "1,200, 200 of them after the schedule"


def test_what_was_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    """A repeated command reads the summary from a file, in which NaN is null."""
    near, far = ({f"eval_{name}_{offset}": value for name, value in values.items()} for offset, values in (
        (1, {"loss": 1.5, "standard_error": 0.01, "accuracy": 0.5, "targets": 12345, "documents": 67}),
        (9, {"loss": None, "standard_error": None, "accuracy": None, "targets": 0, "documents": 0}),
    ))  # fmt: skip
    rows = printed(capsys, {"heads": {"offsets": (1, 9)}}, near | far | {"eval_sequence_length": 2048})
    assert rows["held-out, offset 1"] == "1.5000 ± 0.0100 nats, 50.0% right; 12,345 targets in 67 documents"
    assert rows["held-out, offset 9"] == "- nats, - right; 0 targets in 0 documents"
    assert rows["held-out sequence length"] == "2,048"


def test_settings_that_change_what_is_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(
        capsys,
        {
            "heads": {"offsets": (1,), "top_coefficient": 1.0},
            "weights": {"formula": "abs(x)", "control": "shuffled", "warmup_ratio": 0.1},
            "objective": {"kind": "diversity_or_precision", "beta": -0.25},
        },
        {"already_complete": True, "bad_steps": 2},
    )
    assert rows["title"] == "run: already complete"
    assert rows["weights"] == "abs(x), shuffled control, after a warm-up of 10%"
    assert rows["objective"] == "diversity or precision (beta -0.25, lambda_top 0, lambda_tail 0)"
    assert rows["last logged loss, with token order"] == "2.5000"
    assert rows["steps skipped, not finite"] == "2"


@pytest.mark.parametrize("loss", [None, math.nan])
def test_no_loss_where_none_was_logged(loss: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, {}, {"loss": loss})
    assert not [name for name in rows if "loss" in name or ("weight" in name and name != "weights")]


def test_titles_of_predictions() -> None:
    assert [prediction_title(name) for name in ("1", "12", "top", "phase_0")] == [
        "offset 1",
        "offset 12",
        "token order",
        "phase 0",
    ]
