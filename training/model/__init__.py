"""The model in training: a Hugging Face trunk and the heads on it."""
