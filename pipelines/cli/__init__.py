"""The command line: turns arguments into settings, and exceptions into one-line messages."""
