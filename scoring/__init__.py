"""Stage one: corpora to token shards, token shards to per-token losses and scores."""
