"""Training with weights that need the whole batch: a step depends on its rows, not on their division."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparing import metrics

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration
LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80]


@pytest.fixture
def run(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., list[dict[str, float]]]:
    """`run(name, **changes)` trains six steps and returns the metrics of each."""
    defaults: dict[str, Any] = {
        "input": scored_set(LENGTHS).path,
        "model": str(model_dir()),
        "heads": {"offsets": (1, 2)},
        "optimizer": {"learning_rate": 1e-2},
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 6,
        "log_every": 1,
    }

    def build(name: str, **changes: Any) -> list[dict[str, float]]:
        config = TrainConfig(**(defaults | {"output": tmp_path / name} | changes))
        train(config)
        return [{k: v for k, v in line.items() if k != "mfu"} for line in metrics(config)]

    return build


def test_weights_by_batch_do_not_depend_on_micro_batches(run: Callable[..., list[dict[str, float]]]) -> None:
    weights = {"formula": "normalise(top(excess_loss, 0.25, by=batch), by=batch)"}
    whole, parts = run("whole", weights=weights, micro_batch_size=4), run("parts", weights=weights, micro_batch_size=1)
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert 0.25 <= one["selected_share"] < 0.3  # of the scored; ties are kept


def test_warm_up_begins_with_plain_cross_entropy(run: Callable[..., list[dict[str, float]]]) -> None:
    """At first all targets have weight 1; in the second half only those that the scheme keeps, live or stored."""
    plain = run("plain")
    for name in ("rho1-static", "rho1"):
        column = {"column": "long_short"} if name == "rho1" else {}
        weights = {"preset": name, "fraction": 0.5, "warmup_ratio": 0.5} | column
        steps = run(name, weights=weights)
        shares = [step["selected_share"] for step in steps]
        assert steps[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
        assert [share == 1 for share in shares] == [True] * 3 + [False] * 3
        assert max(shares[3:]) < 0.6
        effective = [step["effective_share"] for step in steps]
        assert effective[:3] == sorted(effective[:3], reverse=True)


def test_fraction_one_of_live_and_stored_schemes_is_plain_cross_entropy(
    run: Callable[..., list[dict[str, float]]],
) -> None:
    plain = run("plain")
    for name, weights in {
        "rho1": {"preset": "rho1", "fraction": 1.0, "column": "long_short"},
        "sparse": {"preset": "sparse", "fraction": 1.0},
        "dense": {"preset": "dense", "lam": 1.0},
        "batch": {"formula": "top(excess_loss, 1, by=batch)"},
    }.items():
        for step, expected in zip(run(name, weights=weights), plain, strict=True):
            assert step == pytest.approx(expected, rel=1e-6), name


def test_the_sum_of_live_weights_takes_their_factor_out(run: Callable[..., list[dict[str, float]]]) -> None:
    weights = {"formula": "2 * normalise(live, by=batch)"}
    doubled = run("doubled", weights=weights, normalization="weight_sum", max_steps=1)
    plain = run("plain", weights={"formula": "normalise(live, by=batch)"}, max_steps=1)
    assert doubled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)


def test_negative_weights_push_tokens_away(run: Callable[..., list[dict[str, float]]]) -> None:
    """With weight -1 for all targets the loss is negative, and the model gets worse on the training data."""
    steps = run("signed", weights={"formula": "signed(0 - 1)"}, normalization="weight_sum")
    assert steps[0]["loss"] < 0
    assert steps[-1]["plain_loss_1"] > steps[0]["plain_loss_1"]
    assert steps[0]["selected_share"] == steps[0]["effective_share"] == 1
    assert not math.isnan(steps[-1]["loss"])


def test_a_run_whose_live_weights_are_all_zero_has_learnt_nothing(
    run: Callable[..., list[dict[str, float]]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="none of the 6 steps had a target with weight"):
        run("silent", weights={"formula": "relu(live - 1000)"})
    lines = (tmp_path / "silent" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["no_signal_steps"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_formulas_that_cannot_work_are_refused_before_the_model_is_loaded(
    run: Callable[..., list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("weighted_mtp.training.run.train.build_model")
    for formula, message in {
        "loss_x": "no column 'loss_x'",
        "excess_loss": "weights may be negative",
        "top(live - loss_x, 0.5)": "no column 'loss_x'",
    }.items():
        with pytest.raises(UserError, match=message):
            run("refused", weights={"formula": formula})
