"""Entries of training runs, from files made by hand."""

import json
import math
from pathlib import Path

import pytest

from weighted_mtp.pipelines.reports.run_entry import RunEntry, held_out_losses, number, read_metrics, read_run
from weighted_mtp.schemas.errors import UserError


def test_a_finished_run_is_its_summary_and_an_unfinished_one_its_metrics(tmp_path: Path) -> None:
    """A run that has fewer steps than its record says is being continued."""
    inputs = {"input": "a,b", "mix": "0.25 c,d; 0.1 e", "model": "m"}
    (tmp_path / "run.json").write_text(json.dumps({"inputs": inputs, "config": {}, "steps": 9}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2}\n{"step": 4, "loss": null, "eval_loss_top": 1}\n')
    mix = [("0.25", ["c", "d"]), ("0.1", ["e"])]
    unfinished = RunEntry(False, 4, 9, 2.0, {"top": 1.0}, ["a", "b"], mix, 70)
    assert read_run(tmp_path, 70) == unfinished
    summary = {"steps": 8, "loss": 1.5, "eval_loss_1": 3, "eval_accuracy_1": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_run(tmp_path, 70) == unfinished
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"steps": 9}))
    assert read_run(tmp_path, 70) == RunEntry(True, 9, 9, 1.5, {"1": 3.0}, ["a", "b"], mix, 70)


def test_a_record_without_a_number_of_steps(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"inputs": {"input": "a"}}')
    assert read_run(tmp_path, 0) == RunEntry(False, 0, None, None, {}, ["a"], [], 0)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"inputs": {"input": "a"}}')
    (tmp_path / "summary.json").write_text('{"steps": "x"}')
    with pytest.raises(UserError, match=r"summary.json: is damaged \(steps: .*integer.*\); restore it"):
        read_run(tmp_path, 0)
    (tmp_path / "run.json").write_text('{"inputs": 5}')
    with pytest.raises(UserError, match=r"run.json: is damaged \(inputs: "):
        read_run(tmp_path, 0)


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert list(read_metrics(file)) == []
    file.write_bytes(b'{"a": 1}\n\xff\n[1]\n' + b"[" * 10**5 + b'\n{"b": 2}\n{"c":')
    assert list(read_metrics(file)) == [{"b": 2}, {"a": 1}]


def test_only_numbers_count() -> None:
    assert [number(value) for value in (1, 2.5, None, "3", [4], 10**400)] == [1.0, 2.5, None, None, None, None]
    assert math.isinf(number(math.inf) or 0)
    assert held_out_losses({"loss": 1, "eval_loss_1": 2, "eval_loss_2": None, "eval_accuracy_1": 3}) == {"1": 2.0}
