"""Shard files, read without a manifest."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from weighted_mtp.schemas.shard_set.shards import with_float16_scores


def read_shard(path: Path) -> pa.Table:
    """The content of a shard, with scores as float16."""
    with pq.ParquetFile(path) as file:
        return with_float16_scores(file.read())
