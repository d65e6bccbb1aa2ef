"""Weighted multi-token prediction: score tokens offline, then train with weights from the scores.

The subpackages are symbolic links to the top-level folders of the same names.
"""
