"""Editing a finished shard set so that it is still consistent with its own digests."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.shard_set.fingerprints import digest_json, directory_digest
from weighted_mtp.schemas.shard_set.shard_set import STATISTICS
from weighted_mtp.schemas.shard_set.shards import footer_bytes
from weighted_mtp.schemas.storage.files import DATA, MANIFEST, TOKENIZER, sha256_file

Json = dict[str, Any]


def rewrite_manifest(path: Path, edit: Callable[[Json], object]) -> None:
    """Edit the manifest and make its digest that of the edited content."""
    content = json.loads((path / MANIFEST).read_text())
    edit(content)
    content["digest"] = digest_json({key: value for key, value in content.items() if key not in ("digest", "timings")})
    (path / MANIFEST).write_text(json.dumps(content))


def describe_file(path: Path) -> Json:
    """What the manifest says of a shard file, taken from the file."""
    with open(path, "rb") as file:
        footer = hashlib.sha256(footer_bytes(file, path.stat().st_size)).hexdigest()
    metadata = pq.read_metadata(path)
    sizes = {"rows": metadata.num_rows, "row_groups": metadata.num_row_groups, "bytes": path.stat().st_size}
    return {**sizes, "sha256": sha256_file(path), "footer_sha256": footer}


def rewrite_shard(path: Path, edit: Callable[[pa.Table], pa.Table], number: int = 0, **settings: Any) -> None:
    """Edit the rows of a shard, and make the manifest describe the new file; `settings` are those of `write_table`."""
    name = sorted(file.name for file in (path / DATA).iterdir())[number]
    shard = path / DATA / name
    table = edit(pq.ParquetFile(shard).read())
    pq.write_table(table, shard, **settings)
    rewrite_manifest(path, lambda m: m["shards"][number].update(describe_file(shard)))


def rewrite_statistics(path: Path, edit: Callable[[pa.Table], pa.Table], **settings: Any) -> None:
    """Edit the value counts, and make the manifest describe the new file; `settings` are those of IPC files."""
    with pa.ipc.open_file(path / STATISTICS) as reader:
        table = edit(reader.read_all())
    with pa.ipc.new_file(path / STATISTICS, table.schema, **settings) as writer:
        writer.write_table(table)
    rewrite_manifest(path, lambda m: m.update(statistics_sha256=sha256_file(path / STATISTICS)))


def sign_tokenizer(path: Path) -> None:
    """Make the manifest describe the files of the tokenizer."""
    rewrite_manifest(path, lambda m: m["tokenizer"].update(files_sha256=directory_digest(path / TOKENIZER)))
