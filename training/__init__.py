"""Stage two: trains a model on scored shards with a weighted multi-token-prediction loss."""
