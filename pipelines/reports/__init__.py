"""Reports that commands print, on the terminal and as HTML pages."""
