"""Computes one weight per target token from a formula in the weight language (`schemas.weights.language`).

`make_weighting` computes the corpus statistics that a formula needs; the loader then applies it to each row group. The
parts of a formula that need the whole batch (`by=batch`, `live`) are evaluated in the training step, by
`training.weighting.batch`.
"""

from weighted_mtp.training.weighting.stored import Weighting, make_weighting

__all__ = ["Weighting", "make_weighting"]
