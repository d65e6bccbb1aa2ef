import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.list import run
from schemas.configs import ListConfig
from schemas.errors import UserError
from schemas.manifest import write_manifest
from schemas.shard_set import ShardSet


def listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *directories: Path) -> str:
    """What is printed on a screen wide enough for any path, with single spaces."""
    monkeypatch.setenv("COLUMNS", "600")
    run(ListConfig(directories=list(directories)))
    return " ".join(capsys.readouterr().out.split())


def test_sets_columns_and_lineage(
    make_shard_set: Callable[..., ShardSet], tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    tokens = make_shard_set([[1, 2], [3, 4]], name="deep/tokens")
    scores = {"loss_reference": [[np.nan, 1.0]] * 2, "excess_loss": [[np.nan, 0.5]] * 2}
    scored = make_shard_set([[1, 2], [3, 4]], scores, name="scored")
    write_manifest(scored.path, scored.manifest.model_copy(update={"derived_from": tokens.manifest.digest}))
    shutil.copytree(tokens.path, tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    output = listed(capsys, monkeypatch, tmp_path)
    assert f"{tokens.path} │ corpus.jsonl │ 4 │" in output
    assert f"{scored.path} │ {tokens.path} │ 4 │" in output
    assert "loss_reference: m, full context, float32, transformers 5" in output
    assert "excess_loss: loss_base - loss_reference" in output
    assert "format version None is not 1" in output
    alone = listed(capsys, monkeypatch, scored.path)
    assert f"a set not found, {tokens.manifest.digest[:12]}" in alone


def test_nothing_to_list(tmp_path) -> None:
    with pytest.raises(UserError, match="no shard set here"):
        run(ListConfig(directories=[tmp_path]))
    with pytest.raises(UserError, match="no such directory"):
        run(ListConfig(directories=[tmp_path / "nowhere"]))
