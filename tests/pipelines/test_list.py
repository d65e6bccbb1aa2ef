import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from upath import UPath

from weighted_mtp.pipelines.list import run
from weighted_mtp.schemas.configs import ListConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import write_manifest
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA, write_text
from weighted_mtp.schemas.storage.locations import Location, join, locate


def listed(capsys: pytest.CaptureFixture[str], *directories: Location, damaged: int = 0) -> list[str]:
    with pytest.raises(UserError, match=f"^{damaged} of .* entries cannot be read") if damaged else nullcontext():
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
    broken, *rest = listed(capsys, tmp_path, damaged=1)
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


def test_directories_may_be_called_like_addresses(
    make_shard_set: Callable[..., ShardSet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http:/host/set", "data:a,b"):
        make_shard_set([[1, 2]], name=name)
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path, locate(".")):
        found = [line.partition(": ")[0] for line in listed(capsys, directory)]
        assert found == [str(join(directory, name)) for name in ("data:a,b", "http:/host/set")]


def test_nothing_to_list(tmp_path) -> None:
    with pytest.raises(UserError, match="no shard set or run here"):
        run(ListConfig(directories=[tmp_path]))
    with pytest.raises(UserError, match="no such directory"):
        run(ListConfig(directories=[tmp_path / "nowhere"]))


def write_run(path: Path, inputs: dict[str, str], summary: dict[str, Any] | None, lines: list[str]) -> int:
    """Write the records of a run of 20 steps; return the size of its files."""
    (path / "model").mkdir(parents=True)
    (path / "model" / "model.safetensors").write_bytes(bytes(1000))
    (path / "config.yaml").write_text("seed: 0")
    (path / "run.json").write_text(json.dumps({"config": {}, "inputs": inputs, "steps": 20}))
    (path / "metrics.jsonl").write_text("\n".join(lines))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_runs_and_unfinished_sets(
    make_shard_set: Callable[..., ShardSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unfinished run, or one that is being continued, shows what its metrics show, without their damaged lines."""
    tokens, other = make_shard_set([[1, 2]], name="tokens"), make_shard_set([[1, 3]], name="other")
    digests = [shards.manifest.digest for shards in (tokens, other)]
    inputs = {"input": ",".join(digests), "mix": f"0.2 {digests[1]}; 0.1 {'c' * 64}", "model": "m"}
    lines = [
        '{"step": 9, "eval_loss_1": 4.0}',
        '{"step": 10, "loss": 3.5}',
        '{"step": 12, "loss": null}',
        '{"step": 15,',
    ]
    summary = {"steps": 20, "loss": 2.5, "eval_loss_1": 3.0, "eval_accuracy_1": 0.5, "bad_steps": 0}
    sizes = [
        write_run(tmp_path / "runs" / "done", inputs, summary, lines),
        write_run(tmp_path / "runs" / "going-on", inputs, summary | {"steps": 10}, lines),
        write_run(tmp_path / "runs" / "stopped", {"input": digests[0]}, None, lines),
    ]
    (tmp_path / "half" / ".progress").mkdir(parents=True)
    (tmp_path / "half" / ".progress" / "request.json").write_text("{}")
    (tmp_path / "half" / DATA).mkdir()
    (tmp_path / "half" / DATA / "shard-00001-of-00004.parquet").touch()
    (tmp_path / "just-begun" / ".progress").mkdir(parents=True)
    (tmp_path / "just-begun" / ".progress" / "request.json").write_text("{}")
    both = [
        f"    input  {tokens.path}, {other.path}",
        f"    mix    0.2 {other.path}",
        f"    mix    0.1 a set not found, {'c' * 12}",
    ]
    unfinished = "unfinished training run, 12 of 20 steps, loss 3.5, held-out loss 4 (offset 1)"
    assert [line for line in listed(capsys, tmp_path) if "tokens," not in line or "input" in line] == [
        f"{tmp_path}/half: unfinished shard set, 1 of 4 shards done",
        f"{tmp_path}/just-begun: unfinished shard set, 0 shards done",
        f"{tmp_path}/runs/done: training run, 20 of 20 steps, loss 2.5, held-out loss 3 (offset 1), {sizes[0]:,} bytes",
        *both,
        f"{tmp_path}/runs/going-on: {unfinished}, {sizes[1]:,} bytes",
        *both,
        f"{tmp_path}/runs/stopped: {unfinished}, {sizes[2]:,} bytes",
        f"    input  {tokens.path}",
    ]
    assert (
        listed(capsys, tmp_path / "runs" / "stopped")[0] == f"{tmp_path}/runs/stopped: {unfinished}, {sizes[2]:,} bytes"
    )


DAMAGE = [
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b'{"steps": 1e999, "inputs": {}}',
    b'{"steps": ' + b"9" * 5000 + b', "inputs": {}}', b'{"steps": "many", "inputs": {"input": 7}}',
    b'{"steps": -1, "inputs": null, "format_version": 3}',
    b'{"format_version": "\\u001b[2J", "inputs": {"input": "\\ud800"}}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize("file", ["tokens/manifest.json", "run/run.json", "run/summary.json", "run/metrics.jsonl"])
def test_a_damaged_entry_is_one_line_and_the_others_follow(
    file: str,
    content: bytes,
    make_shard_set: Callable[..., ShardSet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = make_shard_set([[1, 2]], name="tokens")
    summary = None if file.endswith("metrics.jsonl") else {"steps": 20, "loss": 1.0}
    write_run(tmp_path / "run", {"input": shards.manifest.digest}, summary, [])
    write_run(tmp_path / "sound", {"input": "x"}, {"steps": 20}, [])
    (tmp_path / file).write_bytes(content)
    harmless = file.endswith("metrics.jsonl")
    lines = listed(capsys, tmp_path, damaged=0 if harmless else 1)
    headings = [line for line in lines if not line.startswith(" ")]
    assert [line.removeprefix(f"{tmp_path}/").split("/")[0].split(":")[0] for line in headings] == [
        "run", "sound", "tokens"
    ]  # fmt: skip
    assert all(line.isprintable() for line in lines)
    if not harmless:
        assert len([line for line in headings if "training run" in line or "tokens," in line]) == 2


def test_extreme_values_and_names_are_printed_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a directory whose name is not UTF-8."""
    path = Path(f"{tmp_path}/\x1b[31m\udcff\n")
    lines = [
        f'{{"step": {"9" * 4000}, "loss": 1e999, "eval_loss_1": {"9" * 400}, "eval_loss_\\u001b": 2}}',
        '{"step": "x"}',
    ]
    write_run(path, {"input": "\x1b[2J", "mix": ";; 0.5"}, None, lines)
    shown = listed(capsys, tmp_path)
    assert [line[:11] for line in shown[1:]] == ["    input  ", "    mix    ", "    mix    "]
    assert all(line.isprintable() for line in shown)
    assert shown[0].startswith(f"{tmp_path}/\\x1b[31m\\udcff\\n: unfinished training run, 9,999,999,")
    assert "loss inf" in shown[0]


def test_other_files_of_the_same_names_are_not_runs(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no shard set or run here"):
        run(ListConfig(directories=[tmp_path]))


@pytest.mark.integration
def test_an_object_store_is_listed_like_a_disk(
    s3: UPath, make_shard_set: Callable[..., ShardSet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shard_set([[1, 2]], name="tokens")
    write_run(tmp_path / "run", {"input": shards.manifest.digest}, {"steps": 20}, [])
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        (s3 / file.relative_to(tmp_path).as_posix()).write_bytes(file.read_bytes())
    write_text(s3 / "half" / ".progress" / "request.json", "{}")
    here, there = listed(capsys, tmp_path), listed(capsys, s3)
    assert there[0] == f"{s3}/half: unfinished shard set, 0 shards done"
    assert there[1:] == [line.replace(str(tmp_path), str(s3)) for line in here]
    assert listed(capsys, s3 / "run")[0] == there[1]
