"""Weighted multi-token prediction: find out offline which tokens matter, then train on that.

The subpackages are links to the folders of the same names at the top of the repository.
"""
