"""What the two stages agree on: run configs, the shard format, the manifest, fingerprints.

Nothing here needs torch, ray or vllm.
"""
