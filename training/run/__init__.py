"""One training run: its settings checked, its directory, its checkpoints, from start to summary."""
