"""Engines: frozen language models that compute token losses, in vLLM or in transformers."""
