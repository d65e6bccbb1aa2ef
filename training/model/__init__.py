"""The trained model: a Hugging Face trunk and its heads."""
