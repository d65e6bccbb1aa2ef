"""What a scoring run computes: a loss column for each condition, and the contrasts between them.

A condition is a model and the context it may see. Every token has one loss under a condition; a contrast is the
difference of two losses of the same token.
"""

from dataclasses import dataclass

from schemas.manifest import Contrast, Window
from scoring.models import ScoringModel


@dataclass(frozen=True)
class Loss:
    """The condition behind a loss column; `window` is None for the full context."""

    model: ScoringModel
    window: Window | None = None


@dataclass(frozen=True)
class ScoringPlan:
    """Columns of a scoring run by name. Every contrast refers to two of the losses."""

    losses: dict[str, Loss]
    contrasts: dict[str, Contrast]

    @property
    def columns(self) -> tuple[str, ...]:
        """All column names in the order of the shards: losses, then contrasts."""
        return (*self.losses, *self.contrasts)

    @property
    def models(self) -> list[ScoringModel]:
        """The distinct models; those with the same weights and config are one model."""
        distinct: dict[str, ScoringModel] = {}
        for loss in self.losses.values():
            distinct.setdefault(loss.model.fingerprint, loss.model)
        return list(distinct.values())


def plan_columns(reference: ScoringModel, base: ScoringModel | None, window: Window | None) -> ScoringPlan:
    """The columns that a reference model, a base model and a short context for the reference give.

    `excess_loss` is Rho-1's score (arXiv 2404.07965): large where a token is learnable and not yet learnt.
    `long_short` is large where the long context is what makes a token predictable (LongCE, arXiv 2410.23771).
    """
    losses = {"loss_reference": Loss(reference)}
    contrasts = {}
    if base is not None:
        losses["loss_base"] = Loss(base)
        contrasts["excess_loss"] = Contrast(minuend="loss_base", subtrahend="loss_reference")
    if window is not None:
        losses["loss_short"] = Loss(reference, window)
        contrasts["long_short"] = Contrast(minuend="loss_short", subtrahend="loss_reference")
    return ScoringPlan(losses, contrasts)
