"""The command line: from arguments to settings, and from exceptions to one-line messages."""
