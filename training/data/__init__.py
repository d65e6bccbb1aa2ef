"""From scored shards to packed training rows."""
