"""The scoring job: shards are units of work, scored by Ray workers and committed by the driver."""
