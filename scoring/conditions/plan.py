"""What a scoring run computes: a column for each measurement under a condition, and the contrasts between them.

A condition is a model and the context it may see, before which a prompt may stand. Every token has one loss under a
condition; a contrast is the difference of two losses of the same token.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import (
    Condition,
    Contrast,
    Quantity,
    ScoreColumn,
    ShortContext,
    same_origin,
)
from weighted_mtp.schemas.storage.files import differences
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.prompts import Prompt

NO_ENGINE = {"model", "revision", "fingerprint", "window", "prompt", "quantity"}
"""Fields of a condition that say what is measured; the others say with which engine, and how it runs."""


@dataclass(frozen=True)
class Measurement:
    """What a column holds: a quantity under a condition. `window` is None for the full context."""

    model: ScoringModel
    window: ShortContext | None = None
    quantity: Quantity = "loss"
    prompt: Prompt | None = None


@dataclass(frozen=True)
class ScoringPlan:
    """Columns of a scoring run by name.

    Attributes:
        measurements: what is computed.
        contrasts: what is subtracted; each refers to two columns that are stored, measured, or contrasts before it.
        stored: measurements that the input has already.
    """

    measurements: dict[str, Measurement]
    contrasts: dict[str, Contrast]
    stored: dict[str, Measurement] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the new columns in the order of the shards: measurements, then contrasts."""
        return (*self.measurements, *self.contrasts)

    @property
    def quantities(self) -> set[Quantity]:
        """What is measured, of whatever condition."""
        return {of.quantity for of in self.measurements.values()}

    def computed_tokens(self, tokens: int, sequences: int) -> float:
        """How many tokens the engines compute, at most, for so many tokens in so many sequences."""
        return sum(self.computed_by(model, tokens, sequences) for model in self.models)

    def computed_by(self, model: ScoringModel, tokens: int, sequences: int) -> float:
        """The same for one model.

        The full context takes one pass unless its losses are stored, each prompt another one, longer by its tokens, and
        each short context size / stride.
        """
        wanted = self.measured_by(model).values()
        windows = {of.window for of in wanted if of.window}
        prompts = {of.prompt for of in wanted if not of.window}
        if windows and not self.stored_losses(model):
            prompts.add(None)
        passes = len(prompts) + sum(window.size / window.stride for window in windows)
        return tokens * passes + sequences * sum(len(prompt.input_ids) for prompt in prompts if prompt)

    def measured_by(self, model: ScoringModel) -> dict[str, Measurement]:
        """The columns that a model measures, in order."""
        return {name: of for name, of in self.measurements.items() if of.model.fingerprint == model.fingerprint}

    def longest_prompt(self, model: ScoringModel) -> int:
        """Tokens of the longest prompt of a model."""
        return max(len(of.prompt.input_ids) if of.prompt else 0 for of in self.measured_by(model).values())

    def stored_losses(self, model: ScoringModel) -> str | None:
        """Name of the column that has the losses under a model's full context, if the input has one."""
        for name, of in self.stored.items():
            if of == Measurement(of.model) and of.model.fingerprint == model.fingerprint:
                return name
        return None

    @property
    def models(self) -> list[ScoringModel]:
        """The distinct models that compute anything; those with the same weights and config are one model."""
        distinct: dict[str, ScoringModel] = {}
        for measurement in self.measurements.values():
            distinct.setdefault(measurement.model.fingerprint, measurement.model)
        return list(distinct.values())


def measure_condition(
    name: str, model: ScoringModel, prompt: Prompt | None, further: Collection[Quantity] = ()
) -> dict[str, Measurement]:
    """The columns of a condition of this name with the full context: its loss, and further quantities."""
    quantities: tuple[Quantity, ...] = ("loss", *further)
    return {f"{quantity}_{name}": Measurement(model, None, quantity, prompt) for quantity in quantities}


def plan_columns(
    reference: ScoringModel | None,
    base: ScoringModel | None,
    window: ShortContext | None,
    further: Collection[Quantity] = (),
) -> ScoringPlan:
    """The columns that a reference model, a base model, a short context and further quantities of the reference give.

    `excess_loss` is Rho-1's score (arXiv 2404.07965): large where a token is learnable and not yet learnt.
    `entropy_reference` is for self-reference selection (Rho-1, appendix H).
    `long_short` is large where the long context is what makes a token predictable (LongCE, arXiv 2410.23771).
    """
    if reference is None:
        return ScoringPlan({}, {})
    measurements = measure_condition("reference", reference, None, further)
    contrasts = {}
    if base is not None:
        measurements["loss_base"] = Measurement(base)
        contrasts["excess_loss"] = Contrast(minuend="loss_base", subtrahend="loss_reference")
    if window is not None:
        measurements["loss_short"] = Measurement(reference, window)
        contrasts["long_short"] = Contrast(minuend="loss_short", subtrahend="loss_reference")
    return ScoringPlan(measurements, contrasts)


def parse_contrast(difference: str) -> Contrast:
    """The contrast that is written `minuend - subtrahend`."""
    minuend, subtrahend = difference.split("-")
    return Contrast(minuend=minuend.strip(), subtrahend=subtrahend.strip())


def reuse_columns(
    plan: ScoringPlan, conditions: Mapping[str, Condition], held: Mapping[str, ScoreColumn], suffix: str
) -> ScoringPlan:
    """What is left to do where the input holds columns already.

    A measurement whose condition has a column, whatever its name, is not computed again, nor is such a contrast.

    Args:
        plan: everything that is asked for.
        conditions: the condition of each measurement.
        held: columns of the input.
        suffix: added to the names of new columns.

    Raises:
        UserError: a new column has the name of another one, a contrast is of a column that is not there or of columns
            that cannot be compared, or there are no new columns.
    """
    names: dict[str, str] = {}
    left = ScoringPlan({}, {})
    for name, measurement in plan.measurements.items():
        same = (column for column, of in held.items() if same_origin(of.origin, conditions[name]))
        if stored := next(same, None):
            left.stored[stored] = measurement
        else:
            check_name(name + suffix, held, conditions[name])
            left.measurements[name + suffix] = measurement
        names[name] = stored or name + suffix
    sources = dict(conditions)
    for name, contrast in plan.contrasts.items():
        sources[name] = check_sides(name, contrast, sources, held)
        renamed = Contrast(
            minuend=names.get(contrast.minuend, contrast.minuend),
            subtrahend=names.get(contrast.subtrahend, contrast.subtrahend),
        )
        stored = next((column for column, of in held.items() if of.origin == renamed), None)
        if stored is None:
            check_name(name + suffix, held, renamed)
            left.contrasts[name + suffix] = renamed
        names[name] = stored or name + suffix
    if not left.columns:
        raise UserError(f"--input has all of these columns already ({', '.join(names.values())}); ask for others")
    return left


def check_sides(
    name: str, contrast: Contrast, sources: Mapping[str, Condition], held: Mapping[str, ScoreColumn]
) -> Condition:
    """Check the two columns of a contrast.

    Args:
        name: of the contrast.
        contrast: which columns it is of.
        sources: columns that this run has by then, each with a condition that it comes from.
        held: columns of the input.

    Returns:
        A condition that the contrast comes from: all of one column have the same engine.

    Raises:
        UserError: a column is not there, or the two come from different engines, or from one run in different ways.
    """
    origins: list[Condition] = []
    for side in (contrast.minuend, contrast.subtrahend):
        if side not in sources.keys() | held.keys():
            there = ", ".join([*sources, *(column for column in held if column not in sources)]) or "none"
            raise UserError(
                f"--contrasts.{name}: no column '{side}' is computed before it or in --input (there are {there})"
            )
        origin = sources[side] if side in sources else held[side].origin
        while isinstance(origin, Contrast):  # whose own two columns agree
            origin = held[origin.minuend].origin
        origins.append(origin)
    one, other = (origin.model_dump(mode="json", exclude=NO_ENGINE) for origin in origins)
    if changed := differences(one, other):
        raise UserError(
            f"--contrasts.{name}: {contrast.describe()} would mix engines ({', '.join(changed)} differ), whose results "
            "differ by more than scores resolve; score both columns with the same settings"
        )
    return origins[0]


def check_name(name: str, held: Mapping[str, ScoreColumn], origin: Condition | Contrast) -> None:
    """Raise UserError if a column of the input has this name; `origin` is what would be written under it."""
    if name in held:
        before, after = (one.model_dump(mode="json") for one in (held[name].origin, origin))
        raise UserError(
            f"--input has a column {name} of another origin ({', '.join(differences(before, after))} differ); "
            "give the new columns other names with --suffix"
        )
