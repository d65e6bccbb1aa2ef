"""Weighted losses of all heads against one shared unembedding."""
