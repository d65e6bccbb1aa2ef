"""A shard set as a data set repository of the Hugging Face hub: what is uploaded is read again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub.file_download import repo_folder_name

from weighted_mtp import ShardSet, UserError, token_weights
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import sha256_file

pytestmark = pytest.mark.slow

REPOSITORY = "owner/scored"
SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
EXCESS = [[np.nan, -1, 0], [np.nan, 3.5], [np.nan, 0, 0.25, 0.125]]


@pytest.fixture
def shards(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    return make_shard_set(SEQUENCES, {"excess_loss": EXCESS}, sequence_columns={"group": ["a", "b", "a"]})


def files_of(shards: ShardSet) -> list[str]:
    """Relative paths of all files of a set; `HfApi.upload_folder` uploads all of them."""
    return [str(file.relative_to(shards.path)) for file in shards.path.rglob("*") if file.is_file()]


def test_a_repository_on_disk_is_the_shard_set(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files_of(shards):
        (tmp_path / REPOSITORY / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shards.path / file, tmp_path / REPOSITORY / file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    streamed = datasets.load_dataset(REPOSITORY, split="train", streaming=True)
    loaded = datasets.load_dataset(REPOSITORY, split="train", cache_dir=str(tmp_path / "cache"))
    for rows in (list(streamed), list(loaded)):
        assert [row["input_ids"] for row in rows] == SEQUENCES
        assert [row["group"] for row in rows] == ["a", "b", "a"]
        for row, expected in zip(rows, EXCESS, strict=True):
            np.testing.assert_array_equal(row["excess_loss"], expected)

    copy = ShardSet.open(REPOSITORY)
    assert [check.fault for check in verify(copy.path, copy.manifest) if check.fault] == []
    assert copy.manifest == shards.manifest
    for own, wanted in zip(token_weights(copy, "rho1-static"), token_weights(shards, "rho1-static"), strict=True):
        np.testing.assert_array_equal(own, wanted)


def test_the_cache_of_a_download_is_read_by_datasets_and_refused_here(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of huggingface_hub has links to files in `blobs`."""
    folder = tmp_path / repo_folder_name(repo_id=REPOSITORY, repo_type="dataset")
    snapshot = folder / "snapshots" / ("0" * 40)
    for file in files_of(shards):
        blob, link = folder / "blobs" / sha256_file(shards.path / file), snapshot / file
        for directory in (blob.parent, link.parent):
            directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shards.path / file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = datasets.load_dataset(str(snapshot), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["input_ids"] == SEQUENCES
    with pytest.raises(UserError, match="link"):
        ShardSet.open(snapshot)
    shutil.copytree(snapshot, tmp_path / "copy")
    assert ShardSet.open(tmp_path / "copy").manifest == shards.manifest
