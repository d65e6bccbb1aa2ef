from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_VALUES, float16_bits
from weighted_mtp.schemas.shard_set.shards import (
    ROW_GROUP_TOKENS,
    SCORE_TYPE,
    ShardFile,
    ShardReader,
    flat_values,
    list_column,
    list_lengths,
    shard_name,
    shard_schema,
    split_by_tokens,
    write_shard,
)
from weighted_mtp.schemas.storage.files import sha256_file


def token_table(lengths: list[int], **scores: np.ndarray) -> pa.Table:
    ids = np.arange(sum(lengths), dtype=np.int32)
    columns = {
        "document_id": pa.array([f"doc-{i}" for i in range(len(lengths))]),
        "start": pa.array(range(len(lengths)), pa.int64()),
        "input_ids": list_column(ids, np.array(lengths)),
    }
    return pa.table(columns | {name: list_column(values, np.array(lengths)) for name, values in scores.items()})


def shard_file(path: Path, entry: ShardEntry) -> ShardFile:
    """The shard `path`, with the schema in its footer."""
    schema = pq.read_schema(path) if path.exists() and entry.bytes else shard_schema()
    return ShardFile(ShardReader(path.parent, schema, id_limit=1 << 20), entry)


def test_shards_round_trip_bit_for_bit(tmp_path: Path) -> None:
    losses = FLOAT16_VALUES[float16_bits(np.array([np.nan, 0.1, 65504, -3.3, 6e-8, 0]))]
    path = tmp_path / shard_name(0, 1)
    entry = write_shard(path, token_table([2, 1, 3], loss_reference=losses))
    table = shard_file(path, entry).read()
    assert pq.read_schema(path).equals(shard_schema(("loss_reference",)))
    assert table.schema.field("loss_reference").type == SCORE_TYPE
    assert str(shard_file(path, entry).read_hashed()) == str(table)
    assert table["document_id"].to_pylist() == ["doc-0", "doc-1", "doc-2"]
    assert table["input_ids"].to_pylist() == [[0, 1], [2], [3, 4, 5]]
    np.testing.assert_array_equal(flat_values(table["loss_reference"]), losses)
    np.testing.assert_array_equal(list_lengths(table["loss_reference"]), [2, 1, 3])
    assert (entry.rows, entry.tokens, entry.row_groups) == (3, 6, 1)
    assert (entry.bytes, entry.sha256) == (path.stat().st_size, sha256_file(path))


def test_sequence_columns_stand_between_ids_and_scores(tmp_path: Path) -> None:
    table = token_table([2, 1], loss_reference=np.zeros(3, np.float32))
    table = table.add_column(3, "group", pa.array(["b", "a"])).add_column(3, "reward", pa.array([0.1, -2.0]))
    path = tmp_path / "shard.parquet"
    read = shard_file(path, write_shard(path, table)).read()
    assert pq.read_schema(path).equals(shard_schema(("loss_reference",), {"reward": "number", "group": "label"}))
    assert read.column_names == ["document_id", "start", "input_ids", "reward", "group", "loss_reference"]
    assert read["reward"].to_numpy().tobytes() == np.array([0.1, -2], np.float32).tobytes()
    assert read["group"].to_pylist() == ["b", "a"]


def test_lists_are_byte_stream_split_zstd_without_dictionary_or_statistics(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(path, token_table([5, 4], excess_loss=np.arange(9, dtype=np.float32)))
    chunks = {}
    group = pq.read_metadata(path).row_group(0)
    for index in range(group.num_columns):
        chunks[group.column(index).path_in_schema] = group.column(index)
    for name in ("input_ids.list.element", "excess_loss.list.element"):
        assert "BYTE_STREAM_SPLIT" in chunks[name].encodings
        assert not any("DICTIONARY" in encoding for encoding in chunks[name].encodings)
        assert chunks[name].compression == "ZSTD"
        assert not chunks[name].is_stats_set


def test_row_groups_close_once_they_hold_the_wanted_tokens(tmp_path: Path) -> None:
    length = ROW_GROUP_TOKENS // 4 + 1
    path = tmp_path / "shard.parquet"
    entry = write_shard(path, token_table([length] * 9))
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [4, 4, 1]
    assert entry.row_groups == 3
    assert shard_file(path, entry).read(["document_id"], row_group=2)["document_id"].to_pylist() == ["doc-8"]


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [([3, 3, 3], [(0, 2), (2, 3)]), ([9], [(0, 1)]), ([5, 1, 4], [(0, 1), (1, 3)]), ([], []), ([1], [(0, 1)])],
)
def test_split_by_tokens(lengths: list[int], groups: list[tuple[int, int]]) -> None:
    assert list(split_by_tokens(np.array(lengths), 5)) == groups


def test_a_list_column_of_a_slice_has_only_the_values_of_the_slice() -> None:
    table = token_table([2, 3, 1]).slice(1, 1)
    assert flat_values(table["input_ids"]).tolist() == [2, 3, 4]
    assert list_lengths(table["input_ids"]).tolist() == [3]


def test_a_shard_without_rows_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    entry = write_shard(path, token_table([], long_short=np.array([], np.float32)))
    assert (entry.rows, entry.tokens, entry.row_groups) == (0, 0, 0)
    assert shard_file(path, entry).read().num_rows == 0


def test_a_flipped_byte_in_a_page_is_found_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    entry = write_shard(path, token_table([4000], loss_reference=np.linspace(0, 9, 4000).astype(np.float32)))
    group = pq.read_metadata(path).row_group(0)
    chunk = group.column(group.num_columns - 1)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.parquet: shard is damaged .*restore it or rewrite the set") as caught:
        shard_file(path, entry).read()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"shard\.parquet: content differs from the manifest"):
        shard_file(path, entry).read_hashed()


@pytest.mark.parametrize("content", [b"", b"not parquet at all", None])
def test_an_invalid_parquet_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "shard.parquet"
    entry = write_shard(path, token_table([3]))
    file = shard_file(path, replace(entry, bytes=len(content or b"")))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.parquet: shard is (missing|damaged)"):
        file.read()
