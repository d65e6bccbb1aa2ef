"""Paths and object stores, files that appear complete or not at all, and one writer for each output."""
