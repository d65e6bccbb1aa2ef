"""Small corpora available on every machine without downloads."""
