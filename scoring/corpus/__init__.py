"""Corpora to token shards: find files, read and check documents, tokenise, write shards."""
