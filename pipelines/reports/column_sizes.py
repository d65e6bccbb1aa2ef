"""The size of each column of a shard set, for tables."""

from weighted_mtp.schemas.shard_set.shard_set import SAMPLED_FOOTERS, ShardSet


def size_cells(shard_set: ShardSet) -> dict[str, str]:
    """Compressed bytes per token of each column; `~` marks an estimate from some of the shards."""
    estimated = "~" * (len(shard_set.manifest.shards) > SAMPLED_FOOTERS)
    return {name: f"{estimated}{size:.2f}" for name, size in shard_set.bytes_per_token().items()}
