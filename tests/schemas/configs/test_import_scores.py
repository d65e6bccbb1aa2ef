"""The settings of `wmtp import`: lists written with commas."""

import pytest

from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.errors import UserError

SETTINGS = {"input": "tokens", "output": "more"}


def test_files_and_columns_are_separated_by_commas() -> None:
    config = ImportConfig(**SETTINGS, scores="a.jsonl, b/*.parquet", columns="mine, yours")
    assert config.scores == ("a.jsonl", "b/*.parquet")
    assert config.columns == ("mine", "yours")
    assert ImportConfig(**SETTINGS, scores=["a"], columns=["mine"]) == ImportConfig(
        **SETTINGS, scores="a", columns="mine"
    )


def test_scores_are_required() -> None:
    with pytest.raises(UserError, match="scores"):
        ImportConfig(**SETTINGS)
