"""Small corpora that every machine has: nothing is downloaded."""
