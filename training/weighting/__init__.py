"""From a formula in the weight language (`schemas.weights.language`) to one weight for each target token.

`make_weighting` finds out about the corpus what the formula needs, and the loader applies it to one row group at a
time. What is known only when the batch is (`by=batch`, `live`) follows in the training step, by
`training.weighting.batch`.
"""

from weighted_mtp.training.weighting.stored import Weighting, make_weighting

__all__ = ["Weighting", "make_weighting"]
