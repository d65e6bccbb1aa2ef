"""Reads scored shards and packs them into training rows."""
