"""Screens of `wmtp score` for runs made by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weighted_mtp.pipelines.reports.score_summary import (
    FREQUENT_REASONS,
    Scored,
    frequent_reasons,
    print_dry_run,
    print_summary,
)
from weighted_mtp.schemas.shard_set.manifest import Contrast, write_manifest
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement, ScoringPlan, plan_columns
from weighted_mtp.scoring.job.report import DryRun
from weighted_mtp.scoring.job.units import Attempt, RejectedSequence, UnitRecord, write_record

MODEL = ScoringModel("m", Path("m"), "fingerprint", None, parameters=round(0.4 * 989e12 * 3600 / 5))
"""Two FLOPs a parameter for each of 5 tokens take two hours of an H100 at 40%."""


def write_rejects(file: Path, reasons: list[str]) -> None:
    rejects = [
        RejectedSequence(shard="s", row=row, document_id="d", start=0, model="m", reason=reason)
        for row, reason in enumerate(reasons)
    ]
    file.write_text("".join(reject.model_dump_json() + "\n" for reject in rejects))


@pytest.fixture
def scored(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    scores = [[np.nan, 1.0, 2.0], [np.nan, 3.0]]
    return make_shard_set([[1, 2, 3], [4, 5]], {"loss_reference": scores, "excess_loss": scores}, rows_per_shard=1)


def test_the_summary_of_a_run(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(scored, Scored(tokens=3000, resumed=1, seconds=1.5, incidents=2))
    *table, facts, following = capsys.readouterr().out.splitlines()
    (row,) = [line for line in table if "excess_loss" in line]
    assert row.replace("│", " ").split()[1:3] == ["2.000", "0.816"], "mean and deviation of 1, 2 and 3"
    assert facts == (
        "5 tokens in 2 shards; scored 3,000 in 1.5 s (2,000 tokens/s); shards already done: 1; incidents: 2, see above"
    )
    assert following == (
        f"next: wmtp train --input {scored.path} --model MODEL --output RUN --weights.preset rho1-static"
    )


def test_rejects_are_counted_and_explained(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    write_rejects(scored.path / REJECTS, ["token 3 has the score nan", "token 14 has the score nan", "other"])
    entries = [replace(entry, rejects=1) for entry in scored.manifest.shards]
    write_manifest(scored.path, scored.manifest.model_copy(update={"shards": entries}))
    print_summary(ShardSet.open(scored.path), Scored())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:-1] == [
        "5 tokens in 2 shards",
        f"2 sequences could not be scored, see {scored.path / REJECTS}",
        "    2 x m: token N has the score nan",
        "    1 x m: other",
    ]


def test_only_the_most_frequent_reasons_are_shown(tmp_path: Path) -> None:
    letters = "abcdefgh"
    write_rejects(tmp_path / REJECTS, [letter for count, letter in enumerate(letters, 1) for _ in range(count)])
    found = frequent_reasons(tmp_path / REJECTS)
    assert found == [f"{count} x m: {letters[count - 1]}" for count in (8, 7, 6, 5, 4)]
    assert len(found) == FREQUENT_REASONS


def dry_run(capsys: pytest.CaptureFixture[str], run: DryRun) -> dict[str, str]:
    """The printed table."""
    print_dry_run(run)
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.count("│") == 3]
    return {name.strip(): value.strip() for name, value in rows}


def test_a_dry_run_before_the_start(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_columns(MODEL, None, None)
    assert dry_run(capsys, DryRun(Path("out"), scored, plan, set())) == {
        "columns to compute": "loss_reference",
        "shards to score": "2 of 2",
        "tokens to score": "5 of 5",
        "tokens to compute": f"at most 5 by m ({MODEL.parameters:,} parameters)",
        "estimate": "2 GPU hours (2 FLOPs per parameter and token, 40% of an H100's 989 TFLOPS)",
    }


def test_a_dry_run_of_a_stopped_run(scored: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first shard, of 3 tokens, took 3600 seconds; the 2 tokens left take two thirds of an hour."""
    (tmp_path / "out" / PROGRESS).mkdir(parents=True)
    done = scored.manifest.shards[0]
    attempt = Attempt(done.name, "1")
    record = UnitRecord(entry=done, rejects=[], read_seconds=0, score_seconds=3600)
    write_record(tmp_path / "out", attempt, record, {})
    attempt.record(tmp_path / "out").rename(tmp_path / "out" / PROGRESS / done.name)
    unknown = replace(MODEL, parameters=0)
    contrasts = {"new": Contrast(minuend="loss_reference", subtrahend="loss_base")}
    plan = ScoringPlan({"loss_base": Measurement(unknown)}, contrasts, {"loss_reference": Measurement(MODEL)})
    assert dry_run(capsys, DryRun(tmp_path / "out", scored, plan, {done.name})) == {
        "columns to compute": "loss_base, new",
        "columns to reuse": "loss_reference",
        "shards to score": "1 of 2; 1 already done",
        "tokens to score": "2 of 5",
        "tokens to compute": "at most 2 by m (quantised, parameters unknown)",
        "measured so far": "0 tokens/s in one worker's engines: 0.67 worker hours left",
    }
