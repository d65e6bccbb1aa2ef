"""The weight language, and the published weighting schemes written in it."""
