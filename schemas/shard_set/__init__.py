"""The shard set: Parquet shards, their manifest, and exact counts of their values."""
