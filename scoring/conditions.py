"""What a scoring run computes: a column for each measurement under a condition, and the contrasts between them.

A condition is a model and the context it may see. Every token has one loss under a condition; a contrast is the
difference of two losses of the same token.
"""

from dataclasses import dataclass

from schemas.manifest import Contrast, Quantity, Window
from scoring.models import ScoringModel


@dataclass(frozen=True)
class Measurement:
    """What a column holds: a quantity under a condition. `window` is None for the full context."""

    model: ScoringModel
    window: Window | None = None
    quantity: Quantity = "loss"


@dataclass(frozen=True)
class ScoringPlan:
    """Columns of a scoring run by name. Every contrast refers to two of the measurements."""

    measurements: dict[str, Measurement]
    contrasts: dict[str, Contrast]

    @property
    def columns(self) -> tuple[str, ...]:
        """All column names in the order of the shards: measurements, then contrasts."""
        return (*self.measurements, *self.contrasts)

    @property
    def models(self) -> list[ScoringModel]:
        """The distinct models; those with the same weights and config are one model."""
        distinct: dict[str, ScoringModel] = {}
        for measurement in self.measurements.values():
            distinct.setdefault(measurement.model.fingerprint, measurement.model)
        return list(distinct.values())


def plan_columns(
    reference: ScoringModel, base: ScoringModel | None, window: Window | None, entropy: bool = False
) -> ScoringPlan:
    """The columns that a reference model, a base model, a short context and the entropy for the reference give.

    `excess_loss` is Rho-1's score (arXiv 2404.07965): large where a token is learnable and not yet learnt.
    `entropy_reference` is for self-reference selection (Rho-1, appendix H).
    `long_short` is large where the long context is what makes a token predictable (LongCE, arXiv 2410.23771).
    """
    measurements = {"loss_reference": Measurement(reference)}
    contrasts = {}
    if entropy:
        measurements["entropy_reference"] = Measurement(reference, quantity="entropy")
    if base is not None:
        measurements["loss_base"] = Measurement(base)
        contrasts["excess_loss"] = Contrast(minuend="loss_base", subtrahend="loss_reference")
    if window is not None:
        measurements["loss_short"] = Measurement(reference, window)
        contrasts["long_short"] = Contrast(minuend="loss_short", subtrahend="loss_reference")
    return ScoringPlan(measurements, contrasts)
