"""The command line: arguments to settings, and exceptions to one line each."""
