"""Reports of the commands, on the terminal and as HTML pages."""
