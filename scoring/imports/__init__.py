"""Importing columns that other tools computed into a shard set."""
