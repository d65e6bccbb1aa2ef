"""Conditions: models, prompts and short contexts, and the columns to compute."""
