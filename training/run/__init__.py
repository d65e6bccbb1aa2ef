"""One training run, from checked settings to the summary, with its directory and checkpoints."""
