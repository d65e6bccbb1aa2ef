"""What is measured: models, prompts and short contexts, and the columns they give."""
