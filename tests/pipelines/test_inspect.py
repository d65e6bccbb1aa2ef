from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from text_sets import scores_of

from weighted_mtp.pipelines.inspect import run
from weighted_mtp.schemas.configs import InspectConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

MakeShardSet = Callable[..., ShardSet]


def test_the_report_of_a_scored_set(
    make_shard_set: MakeShardSet, sequences: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"loss_reference": scores_of(sequences, 1), "excess_loss": scores_of(sequences)}
    shard_set = make_shard_set(sequences, columns)
    page = tmp_path / "pages" / "report.html"
    run(InspectConfig(set=shard_set.path, samples=2, html=page))
    report = capsys.readouterr().out
    for shown in ("corpus.jsonl", "m, full context, float32", "loss_base - loss_reference", "highest excess_loss", "»"):
        assert shown in report
    assert "<html>" in page.read_text()
    assert "lowest excess_loss" in page.read_text()


def test_a_set_without_any_score_in_a_column(make_shard_set: MakeShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    run(InspectConfig(set=make_shard_set([[1], [2]], {"excess_loss": [[np.nan], [np.nan]]}).path))
    assert "no token has a score" in capsys.readouterr().out


def test_an_unscored_set_shows_sequences(
    make_shard_set: MakeShardSet, sequences: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(InspectConfig(set=make_shard_set(sequences).path, samples=2))
    report = capsys.readouterr().out
    assert "first\\nline" in report
    assert "third" in report
    assert "second" not in report


def test_sequence_columns_are_shown(
    make_shard_set: MakeShardSet, sequences: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    carried = {"reward": [0.5, 1.25, -3.0], "group": ["left", "left", "right"]}
    run(InspectConfig(set=make_shard_set(sequences, sequence_columns=carried).path))
    report = capsys.readouterr().out
    for shown in ("a number for each document", "a label for", "1.25", "-3", "right"):
        assert shown in report


def test_an_unknown_column_is_refused(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    with pytest.raises(UserError, match="no column 'long_short'"):
        run(InspectConfig(set=make_shard_set(sequences).path, column="long_short"))


def test_report_overwrites_nothing_but_pages(make_shard_set: MakeShardSet, sequences: list[list[int]]) -> None:
    shard_set = make_shard_set(sequences)
    manifest = (shard_set.path / "manifest.json").read_text()
    with pytest.raises(UserError, match=r"ends in \.html"):
        run(InspectConfig(set=shard_set.path, html=shard_set.path / "manifest.json"))
    assert (shard_set.path / "manifest.json").read_text() == manifest
