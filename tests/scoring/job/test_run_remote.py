"""`wmtp score` with input, output and models in an object store."""

from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA, LOCK, PROGRESS, copy_files
from weighted_mtp.schemas.storage.locations import walk_files


def upload(source: Path, target: UPath) -> UPath:
    """Copy a shard set or a checkpoint."""
    copy_files(source, target)
    for directory in (path for path in source.iterdir() if path.is_dir()):
        copy_files(directory, target / directory.name)
    return target


@pytest.mark.slow
def test_a_run_in_a_store_is_continued_and_gives_the_bytes_of_a_local_one(
    s3: UPath,
    make_shard_set: Callable[..., ShardSet],
    reference_model: Path,
    base_model: Path,
    score_in_process: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the run that is stopped has its worker on Ray."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = make_shard_set([[number, 7, 8, 9] for number in range(12)], rows_per_shard=4, name="tokens")
    settings = {"engine": "transformers", "short_context": 2}
    models = {"reference": str(reference_model), "base": str(base_model)}
    with monkeypatch.context() as patch:
        patch.setattr("weighted_mtp.scoring.job.run.score_missing", score_in_process)
        there = {"input": tokens.path, "output": tmp_path / "scored"}
        local = run(ScoreConfig.model_validate(settings | models | there))
    remote = {
        "input": upload(tokens.path, s3 / "tokens"),
        "output": s3 / "scored",
        "reference": str(upload(reference_model, s3 / "reference")),
        "base": str(upload(base_model, s3 / "base")),
    }

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weighted_mtp.scoring.job.run.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(ScoreConfig.model_validate(settings | remote))
    done = {name for name in walk_files(s3 / "scored") if name.startswith(PROGRESS) and name.endswith(".parquet")}
    assert len(done) == 3
    (s3 / "scored" / PROGRESS / tokens.manifest.shards[1].name).unlink()
    (s3 / "scored" / PROGRESS / f"{tokens.manifest.shards[1].name}.0123.record").write_bytes(b"of a killed worker")

    monkeypatch.setattr("weighted_mtp.scoring.job.run.score_missing", score_in_process)
    scored = run(ScoreConfig.model_validate(settings | remote))
    assert local is not None
    assert scored is not None
    assert scored.manifest.shards == local.manifest.shards
    assert scored.value_counts().keys() == local.value_counts().keys()
    for shard in local.manifest.shards:
        assert (scored.path / DATA / shard.name).read_bytes() == (local.path / DATA / shard.name).read_bytes()
    names = {path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()}
    assert set(walk_files(s3 / "scored")) == names
    assert LOCK not in names
