import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weighted_mtp.pipelines.list import run
from weighted_mtp.schemas.configs import ListConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import write_manifest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet


def listed(capsys: pytest.CaptureFixture[str], *directories: Path) -> list[str]:
    run(ListConfig(directories=list(directories)))
    return capsys.readouterr().out.splitlines()


def test_sets_columns_and_lineage(
    make_shard_set: Callable[..., ShardSet], tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = make_shard_set([[1, 2], [3, 4]], name="deep/tokens")
    scores = {"loss_reference": [[np.nan, 1.0]] * 2, "excess_loss": [[np.nan, 0.5]] * 2}
    scored = make_shard_set([[1, 2], [3, 4]], scores, name="scored", sequence_columns={"reward": [0.5, 1.0]})
    write_manifest(scored.path, scored.manifest.model_copy(update={"derived_from": tokens.manifest.digest}))
    shutil.copytree(tokens.path, tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    broken, *rest = listed(capsys, tmp_path)
    assert "format version None is not 4" in broken
    sizes = {found.path: sum(shard.bytes for shard in found.manifest.shards) for found in (tokens, scored)}
    assert rest == [
        f"{tokens.path}: 4 tokens, {sizes[tokens.path]:,} bytes, from corpus.jsonl",
        f"{scored.path}: 4 tokens, {sizes[scored.path]:,} bytes, from {tokens.path}",
        "    reward          number of each document",
        "    loss_reference  m, full context, float32, transformers 5",
        "    excess_loss     loss_base - loss_reference",
    ]
    assert listed(capsys, scored.path)[0].endswith(f"from a set not found, {tokens.manifest.digest[:12]}")


def test_nothing_to_list(tmp_path) -> None:
    with pytest.raises(UserError, match="no shard set here"):
        run(ListConfig(directories=[tmp_path]))
    with pytest.raises(UserError, match="no such directory"):
        run(ListConfig(directories=[tmp_path / "nowhere"]))
