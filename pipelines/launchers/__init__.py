"""Launchers: start the processes of a run."""
