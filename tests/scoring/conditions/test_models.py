"""Scoring models in an object store, and models of training runs."""

import pickle
import shutil
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import copy_files
from weighted_mtp.scoring.conditions.models import check_model


def test_a_remote_model_is_the_local_one_on_every_machine(
    make_model: Callable[..., Path],
    make_shard_set: Callable[..., ShardSet],
    s3: UPath,
    tmp_path: Path,
    start_process: Callable[..., BaseProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    directory = make_model()
    copy_files(directory, s3 / "model")
    shards = make_shard_set([[1, 2]])
    local = check_model(str(directory), "--reference", shards)
    remote = check_model(str(s3 / "model"), "--reference", shards)
    assert local.directory == directory
    assert remote.directory.is_relative_to(tmp_path / "here")
    assert (remote.fingerprint, remote.max_length, remote.revision) == (local.fingerprint, local.max_length, None)

    ours, theirs = Pipe()
    elsewhere = {"XDG_CACHE_HOME": str(tmp_path / "there")}
    script = "import pickle\nsaid.send(pickle.loads(model).directory)\n"
    process = start_process(script, elsewhere, model=pickle.dumps(remote), said=theirs)
    process.join()
    assert process.exitcode == 0
    there = ours.recv()
    assert there.is_relative_to(tmp_path / "there")
    assert (there / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()

    with pytest.raises(UserError, match=f"{s3}/nothing: no such directory"):
        check_model(str(s3 / "nothing"), "--reference", shards)


def test_a_finished_run_is_its_trunk(
    make_model: Callable[..., Path], make_shard_set: Callable[..., ShardSet], tmp_path: Path
) -> None:
    """Name and fingerprint are those of its `model` directory."""
    shards = make_shard_set([[1, 2]])
    run = tmp_path / "run"
    shutil.copytree(make_model(), run / "model")
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=f"--base {run}: this training run is not finished; repeat its command"):
        check_model(str(run), "--base", shards)
    (run / "summary.json").write_text("{}")
    assert check_model(str(run), "--base", shards) == check_model(str(run / "model"), "--base", shards)
