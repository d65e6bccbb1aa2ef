"""Sets of format 3, written as that version wrote them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.shard_set.fingerprints import digest_json
from weighted_mtp.schemas.shard_set.shard_set import REJECTS, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_column, list_lengths
from weighted_mtp.schemas.storage.files import MANIFEST, TOKENIZER, copy_files, sha256_file

ENTRY_KEYS = ("name", "rows", "tokens", "longest", "row_groups")
SHORT = pa.list_(pa.field("element", pa.float16(), nullable=False))


def write_format_3(current: ShardSet, path: Path) -> Path:
    """Write a set in format 3 with the values of a set in the current format."""
    copy_files(current.tokenizer_path, path / TOKENIZER)
    content = json.loads((current.path / MANIFEST).read_text()) | {"format_version": 3}
    for number, entry in enumerate(current.manifest.shards):
        table = current.read(number)
        for name in current.manifest.columns:
            index = table.schema.get_field_index(name)
            scores = list_column(flat_values(table[name]).astype(np.float16), list_lengths(table[name]))
            table = table.set_column(index, pa.field(name, SHORT, nullable=False), scores.cast(SHORT))
        lists = [f"{name}.list.element" for name in ("input_ids", *current.manifest.columns)]
        columns = ["document_id", *current.manifest.corpus.sequence_columns]
        file = path / entry.name
        pq.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=columns,
            use_byte_stream_split=lists,
            write_page_checksum=True,
        )
        described = {key: content["shards"][number][key] for key in ENTRY_KEYS}
        digests = {"bytes": file.stat().st_size, "sha256": sha256_file(file), "rejects": 1}
        content["shards"][number] = described | digests
    content["statistics_sha256"] = "0" * 64
    return seal(path, content)


def seal(path: Path, content: dict) -> Path:
    described = {key: value for key, value in content.items() if key not in ("digest", "timings")}
    (path / MANIFEST).write_text(json.dumps(content | {"digest": digest_json(described)}))
    (path / REJECTS).write_text('{"shard": "a"}\n')
    return path
