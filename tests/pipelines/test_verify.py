import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.pipelines.verify import run
from weighted_mtp.schemas.configs import VerifyConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import write_manifest
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.storage.files import DATA, TOKENIZER

MakeShardSet = Callable[..., ShardSet]


@pytest.fixture
def scored(make_shard_set: MakeShardSet) -> ShardSet:
    return make_shard_set([[1, 2], [3, 4], [5, 6]], {"loss_reference": [[np.nan, 1.0]] * 3})


def test_a_sound_set(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    run(VerifyConfig(set=scored.path))
    # Two shards, the statistics and the tokenizer.
    assert "all 4 parts match the manifest (3 sequences, 6 tokens" in capsys.readouterr().out


def test_every_fault_is_listed_and_counted(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (scored.path / DATA / shard.name for shard in scored.manifest.shards)
    first.write_bytes(first.read_bytes()[:10])
    second.unlink()
    (scored.path / DATA / "http:").mkdir()
    (scored.path / DATA / "http:" / "x.parquet").touch()
    with pytest.raises(UserError, match="3 of 5 parts differ from the manifest"):
        run(VerifyConfig(set=scored.path))
    assert capsys.readouterr().out.splitlines() == [
        f"{first}: content differs from the manifest (sha256)",
        f"{second}: missing",
        f"{scored.path}/data/http:/x.parquet: is no shard of the manifest",
    ]


def test_another_tokenizer_is_found(scored: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    file = scored.path / TOKENIZER / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of 4"):
        run(VerifyConfig(set=scored.path))
    assert "not the tokenizer of the corpus" in capsys.readouterr().out

    file.unlink()
    with pytest.raises(UserError, match="1 of 4"):
        run(VerifyConfig(set=scored.path))
    assert "tokenizer: missing" in capsys.readouterr().out


def test_a_manifest_that_misdescribes_tokenizer_or_rejects_is_found(
    scored: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = scored.manifest.tokenizer.model_copy(update={"vocab_size": 300})
    shards = [replace(scored.manifest.shards[0], rejects=1), *scored.manifest.shards[1:]]
    write_manifest(scored.path, scored.manifest.model_copy(update={"tokenizer": tokenizer, "shards": shards}))
    with pytest.raises(UserError, match="2 of 5 parts differ"):
        run(VerifyConfig(set=scored.path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{scored.path / TOKENIZER}: vocabulary, BOS or EOS are not those in the manifest"
    assert lines[1].startswith(f"{scored.path / REJECTS}: missing or damaged")
    (scored.path / REJECTS).write_text("")
    with pytest.raises(UserError, match="2 of 5 parts differ"):
        run(VerifyConfig(set=scored.path))
    assert f"{scored.path / REJECTS}: sequences differ from the numbers in the manifest" in capsys.readouterr().out


def test_a_set_is_verified_listed_and_inspected_where_it_lies(
    make_shard_set: MakeShardSet,
    s3: UPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scores = {"excess_loss": [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, -4, 3]]}
    shards = make_shard_set([[1, 2, 3], [4, 5], [6, 7, 8, 9]], scores, "deep/below", parent=s3)
    assert main(["verify", str(shards.path)]) == 0
    assert f"{s3}/deep/below: all 4 parts match the manifest" in capsys.readouterr().out
    assert main(["list", str(s3)]) == 0
    assert capsys.readouterr().out.startswith(f"{s3}/deep/below: 9 tokens, ")
    assert main(["inspect", str(shards.path), "--samples", "1"]) == 0
    report = capsys.readouterr().out
    assert f"{s3}/deep/below" in report
    assert "highest excess_loss" in report
    (shards.path / DATA / shards.manifest.shards[0].name).unlink()
    assert main(["verify", str(shards.path)]) == 1
    assert "1 of 4 parts differ" in capsys.readouterr().err
