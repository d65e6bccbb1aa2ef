"""The table of the demo's models."""

from typing import Any

from weighted_mtp.pipelines.reports.demo_summary import results_table


def test_losses_have_standard_errors_and_models_without_a_head_have_no_loss() -> None:
    rest: dict[str, Any] = {"tokens": 1000, "selected_share": 0.6, "seconds": 2.0}
    base = {"eval_loss_1": 4.5, "eval_standard_error_1": 0.0125} | rest
    table = results_table({"base": base, "student": base | {"eval_loss_2": 5.5, "eval_standard_error_2": 0.02}}, (1, 2))
    first, second = table.columns[1:3]
    assert list(first.cells) == ["4.5000 ± 0.0125"] * 2
    assert list(second.cells) == ["-", "5.5000 ± 0.0200"]
