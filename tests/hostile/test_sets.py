"""Sets that once ended an operation in something else than one line: a hang, a crash, a traceback or no memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forging import describe_file, rewrite_manifest, rewrite_shard, rewrite_statistics
from mutations import (
    COLUMN_TYPES,
    HOSTILE_JSON,
    EditJson,
    EditRows,
    EditType,
    Mutation,
    ReplaceFile,
    mutate,
    nested,
)
from operations import (
    import_columns,
    inspect_set,
    list_sets,
    mix,
    open_set,
    pack_zipped,
    show_weights,
    shown_by,
    subtract,
    upgrade_set,
    verify_set,
)

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set import shards
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, STATISTICS, ShardSet
from weighted_mtp.schemas.shard_set.value_counts import TABLE_SCHEMA
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, sha256_file
from weighted_mtp.schemas.storage.training_run import METRICS, RUN_RECORD, SETTINGS, SUMMARY

SHARD = f"{DATA}/shard-00000-of-00002.parquet"
OLD_SHARD = "shard-00000-of-00002.parquet"
READERS = (open_set, inspect_set, show_weights, mix, pack_zipped, subtract, import_columns)
FILLS = ((pa.string(), ""), (pa.float32(), 0.0), (pa.int64(), 1))
TOO_DEEP = HOSTILE_JSON.index(nested(600, dict))
Operation = Callable[[Path, Path], None]


def refused(path: Path, *operations: Operation, good: Path | None = None) -> str:
    """The only message of operations on a set, which must all fail."""
    messages = set()
    for operation in operations:
        with pytest.raises(UserError) as caught:
            shown_by(operation, path, good or path.parent / "good")
        messages.add(str(caught.value))
    [message] = messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["fifo", "loop"])
@pytest.mark.parametrize("file", [STATISTICS, REJECTS, SHARD, f"{TOKENIZER}/tokenizer.json"])
def test_entries_that_are_no_files_are_not_read(file: str, kind: str, directory: Path) -> None:
    ReplaceFile(file, kind).apply(directory / "good")
    message = refused(directory / "good", open_set, verify_set)
    assert message.startswith(f"{directory / 'good' / file}: is neither a file nor a directory")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (file, kind)
        for kind in ("fifo", "directory", "sparse")
        for file in (OLD_SHARD, REJECTS, MANIFEST)
        if (file, kind) != (REJECTS, "directory")  # which is not copied
    ],
)
def test_entries_of_old_sets_that_are_no_files_of_their_size_are_not_read(
    file: str, kind: str, directory: Path
) -> None:
    ReplaceFile(file, kind).apply(directory / "old")
    assert str(directory / "old") in refused(directory / "old", upgrade_set)


@pytest.mark.parametrize("file", [STATISTICS, SHARD, f"{TOKENIZER}/tokenizer.json", REJECTS])
def test_huge_files_are_not_read(file: str, directory: Path) -> None:
    ReplaceFile(file, "sparse").apply(directory / "good")
    assert "parts differ from the manifest" in refused(directory / "good", verify_set)
    with pytest.raises(UserError):
        subtract(directory / "good", directory / "good")


def test_a_run_with_pipes_is_listed(directory: Path) -> None:
    run = directory / "work" / "run"  # not beside the set of format 3, which cannot be listed
    run.mkdir()
    (run / RUN_RECORD).write_text('{"inputs": {}}')
    (run / SETTINGS).touch()
    os.mkfifo(run / METRICS)
    os.mkfifo(run / SUMMARY)
    assert f"{run}: unfinished training run, 0 steps" in shown_by(list_sets, run, run)


def test_counts_that_decompress_to_more_than_a_set_can_have_are_not_decompressed(directory: Path) -> None:
    rows = 2_000_000

    def fill(_: pa.Table) -> pa.Table:
        return pa.table([pa.nulls(rows, kind).fill_null(value) for kind, value in FILLS], schema=TABLE_SCHEMA)

    rewrite_statistics(directory / "good", fill, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert (directory / "good" / STATISTICS).stat().st_size < 1 << 20
    allocated = pa.total_allocated_bytes()
    assert "too large" in refused(directory / "good", open_set, show_weights, subtract)
    assert pa.total_allocated_bytes() - allocated < 1 << 20


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_counts_in_any_compression_are_read(compression: str | None, directory: Path) -> None:
    before = ShardSet.open(directory / "good").value_counts()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    rewrite_statistics(directory / "good", lambda table: table, options=options)
    after = ShardSet.open(directory / "good").value_counts()
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].counts, after[name].counts)


def test_counts_of_columns_that_the_set_lacks_are_refused(directory: Path) -> None:
    def add(table: pa.Table) -> pa.Table:
        others = pa.table([[f"x{number}" for number in range(100)], [0.0] * 100, [1] * 100], schema=TABLE_SCHEMA)
        return pa.concat_tables([table, others])

    rewrite_statistics(directory / "good", add)
    assert "counts of other columns" in refused(directory / "good", open_set, show_weights, subtract)


def damage_metadata(content: bytes) -> bytes:
    """The content of an Arrow file whose first record batch has a table of fields far outside of its metadata."""
    stream = pa.BufferReader(content)
    stream.seek(8)
    messages = pa.ipc.MessageReader.open_stream(stream)
    metadata = next(message for message in messages if message.type == "record batch").metadata.to_pybytes()
    return content.replace(metadata, (1 << 20).to_bytes(4, "little") + metadata[4:])


def test_counts_with_damaged_metadata_are_refused(directory: Path) -> None:
    file = directory / "good" / STATISTICS
    file.write_bytes(damage_metadata(file.read_bytes()))
    rewrite_manifest(directory / "good", lambda m: m.update(statistics_sha256=sha256_file(file)))
    assert "is damaged" in refused(directory / "good", open_set, show_weights, subtract)


def edit_manifest(path: Path, at: tuple[str | int, ...], value: Any) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        *outer, last = at
        holder: Any = manifest
        for key in outer:
            holder = holder[key]
        holder[last] = value

    rewrite_manifest(path, edit)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (("corpus", "documents"), 10**30, "corpus.documents: "),
        (("corpus", "documents"), 6, "more documents than sequences"),
        (("corpus", "rejects"), 1 << 63, "corpus.rejects: "),
        (("tokenizer", "vocab_size"), (1 << 31) - 1, "tokenizer.vocab_size: "),
        (("columns", "gain", "statistics", "count"), -1, "columns.gain.statistics.count: "),
        (("columns", "loss_a", "origin", "tensor_parallel_size"), 10**30, "columns.loss_a.origin."),
        (("columns", "loss_a", "origin", "window"), {"size": 10**30, "stride": 1}, "columns.loss_a.origin."),
    ],
    ids=["documents", "more_documents", "rejects", "vocabulary", "count", "parallel", "window"],
)
def test_impossible_numbers_are_refused(at: tuple[str, ...], value: Any, reason: str, directory: Path) -> None:
    edit_manifest(directory / "good", at, value)
    assert f"not a valid manifest ({reason}" in refused(directory / "good", *READERS, verify_set)


def test_a_key_with_a_line_break_cannot_break_the_message(directory: Path) -> None:
    edit_manifest(directory / "good", ("tokenizer", "a\nb"), 1)
    assert "not a valid manifest (tokenizer.a b: " in refused(directory / "good", *READERS, verify_set)


def test_thousands_of_columns_are_refused(directory: Path) -> None:
    def add(manifest: dict[str, Any]) -> None:
        manifest["columns"] |= {f"x{number}": manifest["columns"]["loss_a"] for number in range(1000)}

    rewrite_manifest(directory / "good", add)
    assert "more than 1,000 columns" in refused(directory / "good", *READERS, verify_set)


def test_an_empty_row_group_is_refused(directory: Path) -> None:
    mutate(directory / "good", [EditRows(SHARD, "empty_group")], signed=True)
    assert "has an empty row group" in refused(directory / "good", inspect_set, pack_zipped, subtract)


def test_metadata_of_a_shard_that_is_no_text_is_not_used(directory: Path) -> None:
    """polars aborts on such metadata."""
    mutate(directory / "good", [EditRows(SHARD, "metadata")], signed=True)
    for operation in READERS:
        shown_by(operation, directory / "good", directory / "good")


def test_contrasts_of_columns_that_the_set_lacks_can_be_subtracted(directory: Path) -> None:
    shown_by(subtract, directory / "good", directory / "good")
    edit_manifest(directory / "good", ("columns", "gain", "origin", "minuend"), "nothing")
    shown_by(subtract, directory / "good", directory / "good")


def test_a_label_of_documents_that_do_not_begin_has_no_statistics(directory: Path) -> None:
    """Label `a` occurs in the first shard only."""
    mutate(directory / "good", [EditType(SHARD, 1, COLUMN_TYPES.index(pa.int64()))], True)
    assert "no document with group 'a' begins in the set" in refused(directory / "good", show_weights)


def test_a_tokenizer_that_fails_in_use_is_refused(directory: Path) -> None:
    file = f"{TOKENIZER}/tokenizer_config.json"
    mutate(directory / "good", [EditJson(file, ("model_max_length",), "wrap", 0)], signed=True)
    message = refused(directory / "good", inspect_set, show_weights)
    assert message.startswith(f"{directory / 'good' / TOKENIZER}: cannot be loaded (")
    assert "parts differ" in refused(directory / "good", verify_set)


def set_texts(path: Path, column: str, text: str) -> None:
    """Give all rows of the first shard the same text."""

    def edit(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(column)
        return table.set_column(index, table.schema.field(index), pa.array([text] * table.num_rows))

    rewrite_shard(path, edit)


@pytest.mark.parametrize("column", ["document_id", "group"])
def test_long_ids_and_labels_are_refused(column: str, directory: Path) -> None:
    path = directory / "good"
    set_texts(path, column, "y" * (1 << 16))
    shown = shown_by(inspect_set, path, path) + shown_by(show_weights, path, path)
    assert "y" * 20 in shown
    assert shown.count("y") < 10_000
    set_texts(path, column, "y" * ((1 << 16) + 1))
    assert f"'{column}' has a row of more than 65,536 bytes" in refused(path, open_set)


@pytest.mark.parametrize("column", ["document_id", "group"])
def test_a_dictionary_of_long_texts_is_not_spread_over_all_rows(
    column: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "good"
    set_texts(path, column, "y" * 1000)
    monkeypatch.setattr(shards, "MOST_GROUP_BYTES", 3000)
    list(ShardSet.open(path).sequences())
    monkeypatch.setattr(shards, "MOST_GROUP_BYTES", 2999)
    message = f"'{column}' is too large"
    assert message in refused(path, open_set)
    with pytest.raises(UserError, match="is too long for a shard; use shorter"):
        shards.write_shard(path / "new.parquet", pq.ParquetFile(path / SHARD).read())
    assert not (path / "new.parquet").exists()
    monkeypatch.setattr(shards, "MOST_GROUP_BYTES", 400)
    assert message in refused(path, open_set), "a dictionary larger than that is not even read"


@pytest.mark.parametrize(
    "edits",
    [
        [EditJson(MANIFEST, ("columns", "loss_a", "origin", "engine_args"), "set", TOO_DEEP)],
        [ReplaceFile(f"{TOKENIZER}/tokenizer.json", "sparse")],
        [EditJson(MANIFEST, ("shards", 0, "rejects"), "set", -1)],
    ],
    ids=["nested_too_deep", "huge_tokenizer", "negative_rejects"],
)
def test_old_sets_that_cannot_be_upgraded(edits: list[Mutation], directory: Path) -> None:
    mutate(directory / "old", edits, signed=True)
    assert str(directory / "old") in refused(directory / "old", upgrade_set)


def test_a_shard_of_another_size_is_not_hashed(directory: Path) -> None:
    rewrite_manifest(directory / "good", lambda m: m["shards"][0].update(bytes=m["shards"][0]["bytes"] + 1))
    assert describe_file(directory / "good" / SHARD)["rows"] == 3
    with pytest.raises(UserError):
        shown_by(verify_set, directory / "good", directory / "good")
