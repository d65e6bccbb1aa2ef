"""The shard set: Parquet shards, the manifest that describes them, and exact counts of their values."""
