"""Forged sets: manifests, statistics and files that agree with each other, but not with the format or the data."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from forging import Json, rewrite_manifest, rewrite_shard, rewrite_statistics

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import read_manifest
from weighted_mtp.schemas.shard_set.shard_set import STATISTICS, ShardSet
from weighted_mtp.schemas.shard_set.value_counts import TABLE_SCHEMA
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, sha256_file

SEQUENCES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LOSSES = [[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 4]]
SHARD = "shard-00000-of-00001.parquet"


@pytest.fixture
def forged(make_shard_set: Callable[..., ShardSet]) -> Path:
    """A correct set with one shard, to be forged."""
    columns = {"reward": [0.5, -1.0, 3.0], "group": ["a", "b", "a"]}
    return make_shard_set(SEQUENCES, {"loss": LOSSES}, rows_per_shard=3, sequence_columns=columns).path


def for_scoring(path: Path) -> None:
    """Read a set as a scoring worker does."""
    shards = ShardSet.open(path)
    for number in range(len(shards.manifest.shards)):
        shards.file(number).read_hashed()
    shards.value_counts()


def for_training(path: Path) -> None:
    """Read a set as the loader does."""
    shards = ShardSet.open(path)
    shards.value_counts()
    for number, entry in enumerate(shards.manifest.shards):
        shards.read(number, ["reward", "start", "document_id"])
        for group in range(entry.row_groups):
            shards.read(number, ["input_ids", "loss"], group)


def verified(path: Path) -> list[str]:
    """Faults that `verify` finds."""
    try:
        return [check.fault for check in verify(path, read_manifest(path)) if check.fault]
    except UserError as error:
        return [str(error)]


def assert_refused(path: Path) -> None:
    for read in (for_scoring, for_training):
        with pytest.raises(UserError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    faults = verified(path)
    assert faults
    assert not any("\n" in fault for fault in faults)


def test_a_correct_set_is_read_and_verified(forged: Path) -> None:
    for_scoring(forged)
    for_training(forged)
    assert verified(forged) == []
    rewrite_shard(forged, lambda table: table)
    rewrite_statistics(forged, lambda table: table)
    assert verified(forged) == [], "the tools of this file forge nothing by themselves"


def shard(**values: object) -> Callable[[Json], object]:
    return lambda m: m["shards"][0].update(values)


def statistics(**values: object) -> Callable[[Json], object]:
    return lambda m: m["columns"]["loss"]["statistics"].update(values)


@pytest.mark.parametrize(
    "edit",
    [
        shard(name="/etc/passwd"),
        shard(name=f"../{DATA}/{SHARD}"),
        shard(name=f"elsewhere/{SHARD}"),
        shard(name=".."),
        shard(name=""),
        shard(name=".lock"),
        shard(name="a\\b"),
        shard(name=f"{SHARD}\n"),
        shard(name="x" * 300),
        shard(name=7),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["shards"].append(m["shards"][0] | {"name": "missing.parquet"}),
        shard(row_groups=10**9),
        shard(row_groups=0),
        shard(row_groups=2),
        shard(rows=-1),
        shard(rows=2, tokens=8),
        shard(tokens=10**15),
        shard(tokens=5.5),
        shard(tokens="9"),
        shard(longest=10**9),
        shard(longest=3),
        shard(longest=5),
        shard(bytes=-1),
        shard(bytes=10**12),
        shard(rejects=4),
        shard(sha256="0"),
        shard(footer_sha256="0" * 64),
        lambda m: m["tokenizer"].update(vocab_size=0),
        lambda m: m["tokenizer"].update(vocab_size=1 << 40),
        lambda m: m["tokenizer"].update(vocab_size=9, bos_token_id=None, eos_token_id=None),
        lambda m: m["tokenizer"].update(bos_token_id=258),
        lambda m: m["tokenizer"].update(eos_token_id=-1),
        lambda m: m["tokenizer"].update(files_sha256="../../etc"),
        lambda m: m["corpus"].update(max_length=10**12),
        lambda m: m["corpus"].update(max_length=3),
        lambda m: m["corpus"].update(documents=-1),
        lambda m: m["corpus"]["sequence_columns"].update(reward="label"),
        lambda m: m["corpus"]["sequence_columns"].update(reward="image"),
        lambda m: m["corpus"]["sequence_columns"].update(extra="number"),
        lambda m: m["corpus"]["sequence_columns"].pop("reward"),
        lambda m: m["corpus"]["sequence_columns"].update(start="number"),
        lambda m: m["corpus"]["sequence_columns"].update(loss="number"),
        lambda m: m["columns"].update({"a b": m["columns"]["loss"]}),
        lambda m: m["columns"].update(input_ids=m["columns"]["loss"]),
        lambda m: m["columns"].update(other=m["columns"]["loss"]),
        lambda m: m["columns"].pop("loss"),
        statistics(count=7),
        statistics(count=-3, missing=12),
        statistics(count=9, missing=0),
        statistics(mean=float("nan")),
        statistics(mean=99.0),
        statistics(std=-1.0),
        statistics(quantiles={"0.5": 1.0}),
        lambda m: m.update(statistics_sha256=None),
        lambda m: m.update(statistics_sha256="0" * 64),
        lambda m: m.update(surprise=1),
        lambda m: m.update(format_version=5),
        lambda m: m.update(shards={}),
        lambda m: m.update(request=[]),
    ],
)
def test_a_forged_manifest_is_refused(forged: Path, edit: Callable[[Json], object]) -> None:
    rewrite_manifest(forged, edit)
    assert_refused(forged)


def test_a_deeply_nested_manifest_is_refused(forged: Path) -> None:
    (forged / MANIFEST).write_text('{"request": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert_refused(forged)


def column(name: str, values: object, kind: pa.DataType, nullable: bool = False) -> Callable[[pa.Table], pa.Table]:
    """Replace a column of the shard."""

    def edit(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        return table.set_column(index, pa.field(name, kind, nullable), pa.array(values, kind))

    return edit


def elements(kind: pa.DataType, nullable: bool = False) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable))


@pytest.mark.parametrize(
    "edit",
    [
        column("input_ids", SEQUENCES, elements(pa.int64())),
        column("input_ids", SEQUENCES, elements(pa.uint32())),
        column("input_ids", SEQUENCES, elements(pa.float32())),
        column("input_ids", SEQUENCES, pa.large_list(pa.field("element", pa.int32(), False))),
        column("input_ids", [[[1], [2], [3]], [[4]], [[5]]], elements(elements(pa.int32()))),
        column("input_ids", [[1, None, 3], [4, 5], [6, 7, 8, 9]], elements(pa.int32(), True)),
        column("input_ids", [None, *SEQUENCES[1:]], elements(pa.int32()), True),
        column("input_ids", [[1, 2, 3], [4, 5], []], elements(pa.int32())),
        column("input_ids", [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]], elements(pa.int32())),
        column("input_ids", [[1, 2, 3], [4, 5], [6, 7, 8, -9]], elements(pa.int32())),
        column("input_ids", [[1, 2, 3], [4, 5], [6, 7, 8, 258]], elements(pa.int32())),
        column("input_ids", ["a", "b", "c"], pa.dictionary(pa.int32(), pa.string())),
        column("input_ids", [1, 2, 3], pa.int32()),
        column("input_ids", [None, None, None], pa.null(), True),
        column("loss", [row[:-1] for row in LOSSES], elements(pa.float32())),
        column("loss", [[*row, 0] for row in LOSSES], elements(pa.float32())),
        column("loss", LOSSES[::-1], elements(pa.float32())),
        column("loss", LOSSES, elements(pa.float64())),
        column("loss", [[np.float16(value) for value in row] for row in LOSSES], elements(pa.float16())),
        column("loss", [[1, 1, 1], [1, 1], [1, 1, 1, 1]], elements(pa.int32())),
        column("loss", [[None, 1, 2], *LOSSES[1:]], elements(pa.float32(), True)),
        column("loss", [None, *LOSSES[1:]], elements(pa.float32()), True),
        column("loss", [1.0, 2.0, 3.0], pa.float32()),
        column("start", [0, 0, -1], pa.int64()),
        column("start", [0, 0, 0], pa.int32()),
        column("document_id", ["a", None, "c"], pa.string(), True),
        column("document_id", [1, 2, 3], pa.int64()),
        column("reward", [0.5, float("nan"), 1], pa.float32()),
        column("reward", [0.5, float("inf"), 1], pa.float32()),
        column("reward", [1, 2, 3], pa.int64()),
        lambda table: table.drop_columns(["start"]),
        lambda table: table.drop_columns(["loss"]),
        lambda table: table.append_column("extra", pa.array([1, 2, 3])),
        lambda table: table.select(["start", "document_id", *table.column_names[2:]]),
        lambda table: table.rename_columns([name.replace("loss", "LOSS") for name in table.column_names]),
        lambda table: table.slice(1),
        lambda table: table.slice(0, 0),
        lambda table: pa.concat_tables([table, table]),
    ],
)
def test_a_forged_shard_is_refused(forged: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    rewrite_shard(forged, edit)
    assert_refused(forged)


def test_two_swapped_tokens_are_found_by_scoring_and_by_the_footer(forged: Path) -> None:
    """The file is a correct shard of the same size, but not the one that the manifest describes."""
    path = forged / DATA / SHARD
    size = path.stat().st_size
    before = json.loads((forged / MANIFEST).read_text())["shards"][0]
    rewrite_shard(forged, column("input_ids", [[1, 3, 2], *SEQUENCES[1:]], elements(pa.int32())))
    rewrite_manifest(forged, lambda m: m["shards"][0].update(before | {"bytes": path.stat().st_size}))
    assert size != 0
    assert_refused(forged)
    assert "content differs from the manifest" in " ".join(verified(forged))


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table.slice(1),
        lambda table: pa.concat_tables([table, table]).cast(TABLE_SCHEMA),
        lambda table: table.set_column(2, "count", pa.array([-1] * len(table))),
        lambda table: table.set_column(2, "count", pa.array([10**18] * len(table))),
        lambda table: table.set_column(1, "value", pa.array([0.1] * len(table), pa.float32())),
        lambda table: table.set_column(0, "column", pa.array(["other"] * len(table))),
        lambda table: table.drop_columns(["count"]),
        lambda table: table.cast(pa.schema({"column": pa.string(), "value": pa.float64(), "count": pa.int64()})),
    ],
)
def test_forged_statistics_are_refused(forged: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    rewrite_statistics(forged, edit)
    assert_refused(forged)


@pytest.mark.parametrize("name", [f"{DATA}/{SHARD}", STATISTICS, DATA, TOKENIZER, f"{TOKENIZER}/tokenizer.json"])
def test_links_out_of_the_set_are_refused(forged: Path, name: str, tmp_path: Path) -> None:
    (forged / name).rename(tmp_path / "elsewhere")
    (forged / name).symlink_to(tmp_path / "elsewhere")
    assert_refused(forged)


def test_a_set_behind_a_link_is_read(forged: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(forged)
    for_training(tmp_path / "link")
    assert verified(tmp_path / "link") == []


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 5]], "value counts of 'loss' are not those of the shards"),
        ([[np.nan, 1, 2], [np.nan, 0.5], [np.nan, 4, 4, 4.0001]], "'loss' has a value that is no float16"),
    ],
)
def test_verify_compares_all_scores(forged: Path, values: list[list[float]], fault: str) -> None:
    rewrite_shard(forged, column("loss", values, elements(pa.float32())))
    assert [found for found in verified(forged) if fault in found] == verified(forged) != []


def test_offsets_of_statistics_beyond_the_file_are_refused(forged: Path) -> None:
    """Arrow reads strings where the offsets point to, unless it is told to validate them."""
    file = forged / STATISTICS
    with pa.ipc.open_file(file) as reader:
        table = reader.read_all().combine_chunks()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    content = file.read_bytes()
    offsets = np.arange(0, 4 * len(table) + 1, 4, np.int32)  # of the column name "loss"
    at = content.index(offsets.tobytes()) + 4
    file.write_bytes(content[:at] + np.int32(1 << 30).tobytes() + content[at + 4 :])
    rewrite_manifest(forged, lambda m: m.update(statistics_sha256=sha256_file(file)))
    assert_refused(forged)


def test_a_damaged_footer_of_statistics_is_refused(forged: Path) -> None:
    file = forged / STATISTICS
    content = bytearray(file.read_bytes())
    content[-60:-20] = bytes(40)
    file.write_bytes(content)
    rewrite_manifest(forged, lambda m: m.update(statistics_sha256=sha256_file(file)))
    assert_refused(forged)


@pytest.mark.parametrize("column", ["document_id", "group"])
def test_strings_that_are_not_utf8_are_refused(forged: Path, column: str) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        values = [b"a", b"\xff\xfe", b"a"]
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        spoilt = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"".join(values)))
        index = table.schema.get_field_index(column)
        return table.set_column(index, table.schema.field(column), spoilt)

    rewrite_shard(forged, spoil)
    assert verified(forged) == [f"{forged / DATA / SHARD}: '{column}' has a row that is not UTF-8"]
    with pytest.raises(UserError, match="not UTF-8"):
        list(ShardSet.open(forged).sequences())


def test_a_manifest_that_is_no_file_is_not_read(forged: Path) -> None:
    (forged / MANIFEST).unlink()
    os.mkfifo(forged / MANIFEST)
    assert_refused(forged)
    (forged / MANIFEST).unlink()
    (forged / MANIFEST).symlink_to("/dev/zero")
    assert_refused(forged)


def test_a_huge_manifest_is_not_read(forged: Path) -> None:
    with open(forged / MANIFEST, "wb") as file:
        file.truncate(1 << 40)
    assert_refused(forged)


def test_a_manifest_nested_too_deep_is_refused(forged: Path) -> None:
    """Deep enough for pydantic's limit in the digest, not for that of the JSON parser."""
    nested: Json = {}
    for _ in range(600):
        nested = {"a": nested}
    rewrite_manifest(forged, lambda m: m["columns"]["loss"]["origin"].update(engine_args=nested))
    assert_refused(forged)


@pytest.mark.parametrize("name", ["extra.parquet", "sub/extra.parquet"])
def test_a_shard_that_the_manifest_does_not_list_is_found(forged: Path, name: str) -> None:
    extra = forged / DATA / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes((forged / DATA / SHARD).read_bytes())
    assert verified(forged) == [f"{extra}: is no shard of the manifest"]
