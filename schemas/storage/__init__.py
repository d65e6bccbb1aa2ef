"""Paths and object stores, atomic file writes, and one writer per output directory."""
