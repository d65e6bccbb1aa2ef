"""Engines: frozen language models that score tokens, in vLLM or in transformers."""
