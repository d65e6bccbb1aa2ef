"""Tokens as text, their kinds, and excerpts that mark them."""
