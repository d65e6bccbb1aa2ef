import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import digest_json
from weighted_mtp.schemas.shard_set.manifest import (
    Condition,
    Contrast,
    Imported,
    ImportedFile,
    ImportedValues,
    ScoreColumn,
    Timings,
    read_manifest,
    same_origin,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import MANIFEST, PROGRESS

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 4]]
MakeShardSet = Callable[..., ShardSet]


@pytest.fixture
def scored(make_shard_set: MakeShardSet) -> ShardSet:
    return make_shard_set(SEQUENCES, {"loss_reference": LOSSES})


def edit_manifest(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads((path / MANIFEST).read_text())
    edit(content)
    (path / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: m["shards"][0].update(sha256="0" * 64), "was changed after it was written"),
        (lambda m: m.pop("digest"), "was changed after it was written"),
        (lambda m: m.update(format_version=2), "format version 2 is not 4; install the wmtp that wrote it"),
        (lambda m: m.update(format_version=3), "has format version 3; convert it with 'wmtp upgrade "),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.update(surprise=1), "not a valid manifest"),
        (lambda m: m.pop("shards"), "not a valid manifest"),
    ],
)
def test_an_edited_manifest_is_refused(scored: ShardSet, edit: Callable[[dict], None], complaint: str) -> None:
    edit_manifest(scored.path, edit)
    with pytest.raises(UserError, match=complaint) as caught:
        read_manifest(scored.path)
    assert str(scored.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"'])
def test_an_invalid_manifest_is_refused(scored: ShardSet, text: str) -> None:
    (scored.path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a valid manifest"):
        read_manifest(scored.path)


def test_a_directory_without_a_shard_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard set"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a shard set \(manifest\.json is missing\); check the path"):
        ShardSet.open(tmp_path)
    (tmp_path / PROGRESS).mkdir()
    with pytest.raises(UserError, match=r"not a finished shard set \(manifest\.json is missing\); rerun"):
        ShardSet.open(tmp_path)


def test_the_digest_excludes_itself(scored: ShardSet) -> None:
    content = json.loads((scored.path / MANIFEST).read_text())
    digest = content.pop("digest")
    content.pop("timings")
    assert digest == digest_json(content) == scored.manifest.digest
    changed = scored.manifest.model_copy(update={"derived_from": "elsewhere"})
    assert changed.digest != scored.manifest.digest
    timed = scored.manifest.model_copy(update={"timings": Timings(score_seconds=[1.0])})
    assert timed.digest == scored.manifest.digest


def test_long_prompts_are_shortened_where_they_are_shown():
    condition = Condition(
        model="m", fingerprint="f", dtype="float32", engine="e", engine_version="1", prompt="x\n" * 99
    )
    shown = condition.describe()
    assert shown == 'm, after "' + "x\\n" * 20 + '...", full context, float32, e 1'


def imported(*names: str, column: str = "mine") -> Imported:
    return Imported(files=tuple(ImportedFile(name=n, sha256=n[0] * 64) for n in names), column=column)


def test_imported_columns_of_the_same_files_are_the_same_whatever_their_names() -> None:
    one, other = imported("a", "b"), imported("b.parquet", "a.parquet")
    assert one != other
    assert same_origin(one, other)
    assert not same_origin(one, imported("a", "b", column="yours"))
    assert not same_origin(one, imported("a"))
    assert not same_origin(one, Contrast(minuend="a", subtrahend="b"))


def test_an_imported_column_names_its_files_on_one_line() -> None:
    digest = f"(SHA-256 {'a' * 12})"
    assert imported("a\x1b\n").describe() == f"imported, mine of 'a\\x1b\\n' {digest}"
    assert imported("a", "b").describe() == f"imported, mine of 'a' {digest} and 1 other file"
    assert imported("a", "b", "c").describe().endswith(" and 2 other files")


def test_a_column_of_values_is_the_same_as_another_with_their_digest() -> None:
    one, other = (ImportedValues(values_sha256=letter * 64) for letter in "ab")
    assert same_origin(one, one.model_copy())
    assert not same_origin(one, other)
    assert not same_origin(one, imported("a"))
    assert one.describe() == f"imported from memory (SHA-256 of the values {'a' * 12})"
    for forged in ("A" * 64, "a" * 63, "a" * 64 + "\n", ""):
        with pytest.raises(ValidationError):
            ImportedValues(values_sha256=forged)


def test_each_kind_of_origin_is_read_back_as_itself(scored: ShardSet) -> None:
    column = scored.manifest.columns["loss_reference"]
    values = ImportedValues(values_sha256="a" * 64)
    for origin in (column.origin, Contrast(minuend="a", subtrahend="b"), imported("a"), values):
        written = column.model_copy(update={"origin": origin}).model_dump_json()
        assert ScoreColumn.model_validate_json(written).origin == origin
