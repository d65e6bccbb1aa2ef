"""Directories of training runs, finished or not."""

from pathlib import Path

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.training_run import trained_model


def test_the_model_of_a_run_counts_once_the_run_is_finished(tmp_path: Path) -> None:
    assert trained_model(tmp_path / "nowhere", "--model") is None
    (tmp_path / "model").mkdir()
    assert trained_model(tmp_path, "--model") is None, "not a run"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=f"--reference {tmp_path}: this training run is not finished; repeat its"):
        trained_model(tmp_path, "--reference")
    (tmp_path / "summary.json").write_text("{}")
    assert trained_model(tmp_path, "--model") == tmp_path / "model"
    (tmp_path / "model").rmdir()
    with pytest.raises(UserError, match="not finished"):
        trained_model(tmp_path, "--model")
