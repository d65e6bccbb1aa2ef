"""The weight language, and published weighting schemes written in it."""
