"""The columns of a scoring run: measurements under conditions, and contrasts between columns.

A condition is a model, its context and an optional prompt. It gives every token one loss. A contrast is the difference
of two losses of the same token.
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

MEASUREMENT_FIELDS = {"model", "revision", "fingerprint", "window", "prompt", "quantity"}
"""Fields of a condition that define the measurement. All others describe the engine."""

RENAME = "give the new columns other names with --suffix"
"""What to do if --input has a column of the same name."""


@dataclass(frozen=True)
class Measurement:
    """A column to compute: a quantity of every token under a condition. `window` is None for the full context."""

    model: ScoringModel
    window: ShortContext | None = None
    quantity: Quantity = "loss"
    prompt: Prompt | None = None


@dataclass(frozen=True)
class ScoringPlan:
    """Columns of a scoring run by name.

    Attributes:
        measurements: columns to compute.
        contrasts: column differences. Each refers to stored columns, measurements or earlier contrasts.
        stored: measurements already in the input.
    """

    measurements: dict[str, Measurement]
    contrasts: dict[str, Contrast]
    stored: dict[str, Measurement] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the new columns in the order of the shards: measurements, then contrasts."""
        return (*self.measurements, *self.contrasts)

    @property
    def in_nats(self) -> set[str]:
        """Names of the new columns in nats: losses, entropies and contrasts."""
        measured = {name for name, measurement in self.measurements.items() if measurement.quantity != "gradient"}
        return measured | self.contrasts.keys()

    @property
    def quantities(self) -> set[Quantity]:
        """Quantities to compute, over all conditions."""
        return {measurement.quantity for measurement in self.measurements.values()}

    def computed_tokens(self, tokens: int, sequences: int) -> float:
        """Upper bound of the tokens computed by engines for a corpus of `tokens` tokens in `sequences` sequences."""
        return sum(self.computed_by(model, tokens, sequences) for model in self.models)

    def computed_by(self, model: ScoringModel, tokens: int, sequences: int) -> float:
        """The part of `computed_tokens` for one model.

        The full context takes one pass unless its losses are stored. Each prompt takes one pass, longer by its tokens.
        Each short context takes size / stride passes.
        """
        wanted = self.measured_by(model).values()
        windows = {measurement.window for measurement in wanted if measurement.window}
        prompts = {measurement.prompt for measurement in wanted if not measurement.window}
        if windows and not self.stored_losses(model):
            prompts.add(None)
        passes = len(prompts) + sum(window.size / window.stride for window in windows)
        return tokens * passes + sequences * sum(len(prompt.input_ids) for prompt in prompts if prompt)

    def measured_by(self, model: ScoringModel) -> dict[str, Measurement]:
        """Measurements by one model, in order."""
        fingerprint = model.fingerprint
        return {name: wanted for name, wanted in self.measurements.items() if wanted.model.fingerprint == fingerprint}

    def longest_prompt(self, model: ScoringModel) -> int:
        """Length of a model's longest prompt, in tokens."""
        prompts = [measurement.prompt for measurement in self.measured_by(model).values()]
        return max(len(prompt.input_ids) if prompt else 0 for prompt in prompts)

    def stored_losses(self, model: ScoringModel) -> str | None:
        """Name of the input's column with the full-context losses of a model, or None."""
        for name, stored in self.stored.items():
            if stored == Measurement(stored.model) and stored.model.fingerprint == model.fingerprint:
                return name
        return None

    @property
    def models(self) -> list[ScoringModel]:
        """Distinct models of the measurements. Models with the same weights and config count as one."""
        distinct: dict[str, ScoringModel] = {}
        for measurement in self.measurements.values():
            distinct.setdefault(measurement.model.fingerprint, measurement.model)
        return list(distinct.values())


def measure_condition(
    name: str, model: ScoringModel, prompt: Prompt | None, extra: Collection[Quantity] = ()
) -> dict[str, Measurement]:
    """Measurements of the condition `name` under the full context: the loss and extra quantities."""
    quantities: tuple[Quantity, ...] = ("loss", *extra)
    return {f"{quantity}_{name}": Measurement(model, None, quantity, prompt) for quantity in quantities}


def plan_columns(
    reference: ScoringModel | None,
    base: ScoringModel | None,
    window: ShortContext | None,
    extra: Collection[Quantity] = (),
) -> ScoringPlan:
    """Plan the columns of a reference model, a base model, a short context and extra quantities of the reference.

    `excess_loss` is Rho-1's score (arXiv 2404.07965): large for tokens that are learnable and not yet learnt.
    `entropy_reference` is for self-reference selection (Rho-1, appendix H).
    `long_short` is large for tokens that only the long context makes predictable (LongCE, arXiv 2410.23771).
    """
    if reference is None:
        return ScoringPlan({}, {})
    measurements = measure_condition("reference", reference, None, extra)
    contrasts = {}
    if base is not None:
        measurements["loss_base"] = Measurement(base)
        contrasts["excess_loss"] = Contrast(minuend="loss_base", subtrahend="loss_reference")
    if window is not None:
        measurements["loss_short"] = Measurement(reference, window)
        contrasts["long_short"] = Contrast(minuend="loss_short", subtrahend="loss_reference")
    return ScoringPlan(measurements, contrasts)


def parse_contrast(difference: str) -> Contrast:
    """Parse a contrast written as `minuend - subtrahend`."""
    minuend, subtrahend = difference.split("-")
    return Contrast(minuend=minuend.strip(), subtrahend=subtrahend.strip())


def reuse_columns(
    plan: ScoringPlan, conditions: Mapping[str, Condition], held: Mapping[str, ScoreColumn], suffix: str
) -> ScoringPlan:
    """Remove columns already in the input from a plan.

    A column of the input with the same condition or contrast is reused, regardless of its name.

    Args:
        plan: all requested columns.
        conditions: the condition of each measurement.
        held: columns of the input.
        suffix: added to the names of new columns.

    Raises:
        UserError: the name of a new column is taken, a contrast refers to a missing column or to incomparable columns,
            or there are no new columns.
    """
    names: dict[str, str] = {}
    sources: dict[str, Condition | None] = {}
    new = ScoringPlan({}, {})
    for name, measurement in plan.measurements.items():
        same = (held_name for held_name, column in held.items() if same_origin(column.origin, conditions[name]))
        if stored := next(same, None):
            new.stored[stored] = measurement
        else:
            check_name(name + suffix, held, conditions[name])
            new.measurements[name + suffix] = measurement
        names[name] = stored or name + suffix
        sources[names[name]] = conditions[name]
    for name, written in plan.contrasts.items():
        contrast = resolve_sides(written, names, held, suffix)
        origin = check_sides(name, contrast, sources, held)
        stored = next((held_name for held_name, column in held.items() if column.origin == contrast), None)
        if stored is None:
            check_name(name + suffix, held, contrast)
            new.contrasts[name + suffix] = contrast
        names[name] = stored or name + suffix
        sources[names[name]] = origin
    if not new.columns:
        raise UserError(f"--input already has all of these columns ({', '.join(names.values())}); request others")
    return new


def resolve_sides(contrast: Contrast, names: Mapping[str, str], held: Collection[str], suffix: str) -> Contrast:
    """Replace both names in a contrast by names of columns in the output.

    A name without the suffix means a column of this run if it has one. If the other side is a column of this run with
    its suffix, it means a column of the input: `loss_reference - loss_reference_new`.

    Args:
        contrast: the contrast as written.
        names: columns of this run before the contrast, without suffix, and their names in the output.
        held: columns of the input.
        suffix: added to the names of new columns.
    """
    suffixed = {name + suffix: final for name, final in names.items()} if suffix else {}
    sides = (contrast.minuend, contrast.subtrahend)
    written_out = any(side in suffixed for side in sides)
    minuend, subtrahend = (
        side if written_out and side in held else suffixed.get(side) or names.get(side, side) for side in sides
    )
    return Contrast(minuend=minuend, subtrahend=subtrahend)


def check_sides(
    name: str, contrast: Contrast, sources: Mapping[str, Condition | None], held: Mapping[str, ScoreColumn]
) -> Condition | None:
    """Check the two columns of a contrast.

    Args:
        name: name of the contrast.
        contrast: its two columns, by their names in the output.
        sources: columns of this run before the contrast, each with a condition it derives from, as returned.
        held: columns of the input.

    Returns:
        A condition that the contrast derives from, or None if it derives from imported columns only. All conditions of
        a column share one engine.

    Raises:
        UserError: a column is missing, or the two columns come from different engines or engine settings.
    """
    origins: list[Condition | None] = []
    for side in (contrast.minuend, contrast.subtrahend):
        if side not in sources.keys() | held.keys():
            there = ", ".join([*sources, *(column for column in held if column not in sources)]) or "none"
            raise UserError(
                f"--contrasts.{name}: no column '{side}' in --input or computed before it (available: {there})"
            )
        origins.append(sources[side] if side in sources else condition_of(side, held))
    described = [origin.model_dump(mode="json", exclude=MEASUREMENT_FIELDS) for origin in origins if origin]
    if changed := differences(described[0], described[-1]) if described else []:
        raise UserError(
            f"--contrasts.{name}: {contrast.describe()} would mix engines ({', '.join(changed)} differ), which differ "
            "by more than the precision of scores; score both columns with the same settings"
        )
    return origins[0] or origins[1]


def condition_of(column: str, held: Mapping[str, ScoreColumn]) -> Condition | None:
    """A condition that a column of the input derives from, or None if it derives from imported columns only."""
    waiting, seen = [column], {column}
    while waiting:
        name = waiting.pop()
        match held[name].origin if name in held else None:  # a foreign set may lack the columns of a contrast
            case Condition() as condition:
                return condition
            case Contrast(minuend=minuend, subtrahend=subtrahend):
                new = {minuend, subtrahend} - seen
                waiting += new
                seen |= new
    return None


def check_name(name: str, held: Mapping[str, ScoreColumn], origin: Condition | Contrast) -> None:
    """Raise UserError if the input has a column of this name. `origin` is the origin of the new column."""
    if name in held:
        before, after = (one.model_dump(mode="json") for one in (held[name].origin, origin))
        changed = ", ".join(differences(before, after))
        raise UserError(f"--input has a column {name} with another origin ({changed} differ); {RENAME}")
