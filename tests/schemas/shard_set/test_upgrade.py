"""Sets of format 3, written here as that version wrote them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_3 import seal, write_format_3

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.upgrade import upgrade
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, sha256_file

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 9.25, 70]]
CONTRASTS = [[np.nan, -1, 0], [np.nan, 1 / 512], [np.nan, 4, -4, 33]]


@pytest.fixture
def current(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    columns = {"reward": [0.5, -1.0, 3.0], "group": ["a", "b", "a"]}
    return make_shard_set(SEQUENCES, {"loss_a": LOSSES, "gain": CONTRASTS}, "current", sequence_columns=columns)


@pytest.fixture
def old(current: ShardSet, tmp_path: Path) -> Path:
    return write_format_3(current, tmp_path / "old")


def test_an_upgraded_set_is_the_set_of_the_same_values(old: Path, current: ShardSet, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}
    done: list[str] = []
    upgraded = upgrade(old, tmp_path / "new", lambda shard: done.append(shard.name))
    assert done == [shard.name for shard in current.manifest.shards]
    for name in done:
        assert (tmp_path / "new" / DATA / name).read_bytes() == (current.path / DATA / name).read_bytes()
    opened = ShardSet.open(tmp_path / "new")
    assert opened.manifest == upgraded.manifest
    assert opened.manifest.columns == current.manifest.columns
    assert opened.manifest.corpus == current.manifest.corpus
    assert opened.manifest.derived_from == json.loads((old / MANIFEST).read_text())["digest"]
    assert [shard.rejects for shard in opened.manifest.shards] == [1, 1]
    assert (tmp_path / "new" / REJECTS).read_bytes() == before[REJECTS]
    assert [check.fault for check in verify(opened.path, opened.manifest) if check.fault] == []
    assert {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()} == before
    assert upgrade(old, tmp_path / "new").manifest == opened.manifest, "a second call finds the result"


def test_losses_lose_digits_below_a_512th_but_gradients_do_not(
    make_shard_set: Callable[..., ShardSet], tmp_path: Path
) -> None:
    fine = [[np.nan, 0.0003, 1.0009765625]]
    current = make_shard_set([[1, 2, 3]], {"loss_a": fine, "gradient_a": fine}, "fine")
    old = write_format_3(current, tmp_path / "old")
    content = json.loads((old / MANIFEST).read_text())
    origin = content["columns"]["loss_a"]["origin"]
    content["columns"]["gradient_a"]["origin"] = origin | {"quantity": "gradient"}
    upgraded = upgrade(seal(old, content), tmp_path / "new").read(0)
    np.testing.assert_array_equal(flat_values(upgraded["loss_a"]), [np.nan, 0, 1])
    np.testing.assert_array_equal(flat_values(upgraded["gradient_a"]), np.array(fine[0], np.float16))


def test_a_stopped_upgrade_starts_over(old: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upgrade(old, tmp_path / "new", stop)
    assert len(upgrade(old, tmp_path / "new").manifest.shards) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, content: seal(path, content | {"format_version": 4}), "format version 4; there is nothing to"),
        (lambda path, content: seal(path, content | {"format_version": 2}), "format version 2; there is nothing to"),
        (lambda path, content: (path / MANIFEST).unlink(), "not a shard set"),
        (lambda path, content: (path / MANIFEST).write_text("[]"), "not a valid manifest"),
        (lambda path, content: (path / MANIFEST).write_text(json.dumps(content | {"shards": []})), "was changed after"),
        (lambda path, content: seal(path, {**content, "corpus": 3}), "not a valid manifest"),
        (
            lambda path, content: seal(path, {**content, "shards": [{"name": "../x", "sha256": ""}]}),
            "not a valid manif",
        ),
        (lambda path, content: (path / content["shards"][1]["name"]).unlink(), "shard is missing"),
        (lambda path, content: (path / content["shards"][1]["name"]).write_bytes(b"PAR1"), "content differs"),
        (lambda path, content: seal(path, {**content, "columns": {}}), "columns differ from the manifest"),
        (lambda path, content: (path / TOKENIZER / "tokenizer.json").unlink(), "not the tokenizer of the corpus"),
    ],
)
def test_damaged_sets_are_refused(
    damage: Callable[[Path, dict], object], message: str, old: Path, tmp_path: Path
) -> None:
    damage(old, json.loads((old / MANIFEST).read_text()))
    with pytest.raises(UserError, match=message) as caught:
        upgrade(old, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / MANIFEST).exists()


@pytest.mark.parametrize("link", [REJECTS, f"{TOKENIZER}/notes.txt"])
def test_files_outside_of_the_set_are_not_copied(link: str, old: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (old / link).unlink(missing_ok=True)
    (old / link).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link out of the shard set"):
        upgrade(old, tmp_path / "new")
    assert not (tmp_path / "new").exists() or not any(
        "secret" in path.read_text(errors="ignore") for path in (tmp_path / "new").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("rows", "message"), [([[1, 2, 3], []], "of a length that the manifest excludes"), ([[1], [-4]], "outside the")]
)
def test_rows_that_no_reader_accepts_are_not_upgraded(
    rows: list[list[int]], message: str, old: Path, tmp_path: Path
) -> None:
    content = json.loads((old / MANIFEST).read_text())
    file = old / content["shards"][0]["name"]
    table = pq.ParquetFile(file).read()
    for name in ("input_ids", *content["columns"]):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(name), pa.array(rows).cast(table.schema.field(name).type))
    pq.write_table(table, file)
    content["shards"][0].update(sha256=sha256_file(file), bytes=file.stat().st_size)
    with pytest.raises(UserError, match=message):
        upgrade(seal(old, content), tmp_path / "new")


def test_impossible_numbers_of_an_old_manifest_are_refused(old: Path, tmp_path: Path) -> None:
    content = json.loads((old / MANIFEST).read_text())
    for edit in ({"rejects": float("inf")}, {"name": content["shards"][1]["name"], "sha256": "0"}):
        shards = [content["shards"][0] | edit, content["shards"][1]]
        with pytest.raises(UserError):
            upgrade(seal(old, content | {"shards": shards}), tmp_path / "new")
    with pytest.raises(UserError, match="not a valid manifest"):
        upgrade(seal(old, content | {"corpus": content["corpus"] | {"max_length": 1}}), tmp_path / "new")
