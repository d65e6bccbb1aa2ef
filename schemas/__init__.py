"""Contracts between the two stages: run configs, shard format, manifest, fingerprints.

Imports neither torch, ray nor vllm.
"""
