"""Stage two: scored shards to a model trained with a weighted multi-token-prediction loss."""
