"""Computes token weights from stored columns, or the components of weights that need the batch."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.manifest import Condition, Imported, ImportedValues
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_VALUES
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.weights.analysis import bounds
from weighted_mtp.schemas.weights.function_record import POSITIVE, UNBOUNDED, Bounds
from weighted_mtp.schemas.weights.nodes import (
    LIVE,
    Call,
    ColumnRef,
    Constant,
    FormulaError,
    Node,
    columns_of,
    is_signed,
    labels_of,
    replace_column,
    waits_for_batch,
)
from weighted_mtp.schemas.weights.stages import StagedFormula
from weighted_mtp.training.weighting.controls import Control, apply_control, shuffle_between
from weighted_mtp.training.weighting.corpus import CorpusResolver
from weighted_mtp.training.weighting.expressions import Expression, TableLookup, evaluate_expression
from weighted_mtp.training.weighting.tables import scored_tokens

TOO_LARGE = "--weights.formula: a weight overflows float32; limit it with clip()"


@dataclass(frozen=True)
class Weighting:
    """A formula that can be applied to a shard set.

    Attributes:
        formula: text of the formula.
        columns: columns to read.
        components: the weight, or the inputs of a weight that needs the batch.
        waits: whether the weight needs the batch (see `training.weighting.batch`).
        control: control applied to weights that do not need the batch.
        missing: weight of a token without a score.
        per_sequence: whether all tokens of a sequence have the same weight.
    """

    formula: str
    columns: tuple[str, ...]
    components: tuple[Expression, ...]
    waits: bool = False
    control: Control = "none"
    missing: float = 0.0
    per_sequence: bool = False

    def weigh(self, table: pa.Table, rng: np.random.Generator) -> np.ndarray:
        """Weights of the T tokens of a table of sequences.

        Args:
            table: `input_ids` and the columns.
            rng: for the controls.

        Returns:
            (T,) float32, `missing` for tokens without a score. If the weights need the batch, (T, components), NaN for
            tokens without a score.

        Raises:
            UserError: a weight is not finite.
        """
        match self.components:
            case [TableLookup(ColumnRef(name)) as lookup] if self.control == "none" and not self.waits:
                return lookup.by_value.look_up(flat_values(table[name]))
            case [Constant(value)] if not self.waits:
                return np.full(int(list_lengths(table["input_ids"]).sum()), value, dtype=np.float32)
        scored = scored_tokens(table, self.columns)
        if self.waits:
            components = np.empty((len(self.components), len(scored.mask)), dtype=np.float32)
            for values, component in zip(components, self.components, strict=True):
                values[:] = scored.scatter(_finite(evaluate_expression(component, scored.tokens)), math.nan)
            return components.T
        weights = _finite(evaluate_expression(self.components[0], scored.tokens))
        if self.control == "shuffled" and self.per_sequence:
            weights = shuffle_between(weights, scored.counts, rng)
        else:
            weights = apply_control(self.control, weights, scored.counts, rng)
        return scored.scatter(weights, self.missing)


def make_weighting(
    config: WeightsConfig, shards: ZippedSets, live_column: str | None = None, progress: MakeBar = hidden_bar
) -> Weighting:
    """Prepare the weights of `config` for `shards`.

    Args:
        config: the settings.
        shards: the sets with the columns.
        live_column: column to use in place of the current loss of the trained model.
        progress: makes the bar of a pass over the corpus, which some formulas need.

    Raises:
        UserError: a column is missing, is of the wrong kind or without any score, or weights may be negative.
    """
    node = replace_column(config.node, LIVE, live_column) if live_column else config.node
    check_formula(node, shards)
    corpus = CorpusResolver(shards, progress)
    waits = waits_for_batch(node)
    # During a warm-up, weights of scored tokens start from 1; NaN marks the tokens that must stay at 0.
    missing = math.nan if config.warmup_ratio else 0.0
    components = tuple(corpus.resolve(part) for part in (StagedFormula.split(node).stored if waits else (node,)))
    if not waits:
        _check_values(components[0], corpus)
    finite = np.isfinite(FLOAT16_VALUES)
    components = tuple(
        TableLookup(c.argument, np.where(finite, c.table, missing)) if isinstance(c, TableLookup) else c
        for c in components
    )
    columns = (*columns_of(node), *labels_of(node))
    per_sequence = all(shards.kind(name) != "score" for name in columns)
    return Weighting(config.text, columns, components, waits, config.control, missing, per_sequence)


def check_formula(node: Node, shards: ZippedSets) -> None:
    """Check a formula against the columns of the shard sets, without reading data.

    Raises:
        UserError: a column is missing, is of the wrong kind or without any score, or weights may be negative.
    """
    _check_columns(node, shards)
    _check_labels(node, shards)
    _check_sign(node, shards)


def _check_columns(node: Node, shards: ZippedSets) -> None:
    for name in columns_of(node):
        where = shards.holder(name).path
        kind = shards.kind(name)
        if kind == "label":
            raise UserError(f"{where}: '{name}' holds labels, which have no numeric value; use them with by={name}")
        if kind == "score":
            values = shards.value_counts(name).distinct()[0]
            if not len(values):
                raise UserError(f"{where}: column '{name}' has no scores; choose another --weights.column")
            if not values.any():
                raise UserError(f"{where}: column '{name}' has no value except 0; choose another --weights.column")


def _check_labels(node: Node, shards: ZippedSets) -> None:
    """Raise UserError unless functions by label read number columns and group by a label column."""
    if not isinstance(node, Call):
        return
    for argument in node.arguments:
        _check_labels(argument, shards)
    for label in labels_of(node):
        wanted = [(label, "label")]
        if node.by == label:
            wanted += [(name, "number") for name in columns_of(node)]
        for name, kind in wanted:
            if shards.kind(name) != kind:
                raise UserError(
                    f"{shards.holder(name).path}: '{name}' is not a column of document {kind}s, which "
                    f"standardise(by={label}) needs; prepare the corpus with --{kind}_fields"
                )


def _finite(weights: np.ndarray) -> np.ndarray:
    """Weights as float32; UserError if one is not finite."""
    with np.errstate(over="ignore"):
        weights = np.asarray(weights, np.float32)
    if not np.isfinite(weights).all():
        raise UserError(TOO_LARGE)
    return weights


def _check_values(weights: Expression, corpus: CorpusResolver) -> None:
    """Raise UserError if weights are known to be 0 for all tokens, or to overflow for some."""
    values = np.array([1.0])
    if isinstance(weights, Constant):
        values = np.array([weights.value])
    elif isinstance(weights, TableLookup) and isinstance(weights.argument, ColumnRef):
        values = corpus.distribution(weights).values
    if not _finite(values).any():
        raise UserError("--weights: weights are 0 for every token, so there is nothing to learn; choose others")


def _check_sign(node: Node, shards: ZippedSets) -> None:
    def of_column(name: str) -> Bounds:
        column = shards.holder(name).manifest.columns.get(name)
        match column and column.origin:
            case Condition():
                return POSITIVE
            case Imported() | ImportedValues():
                return POSITIVE if shards.value_counts(name).distinct()[0][0] >= 0 else UNBOUNDED
        return UNBOUNDED

    try:
        low, _ = bounds(node, of_column)
    except FormulaError as error:
        raise UserError(f"--weights.formula: {error}") from None
    if low < 0 and not is_signed(node):
        raise UserError(
            "--weights.formula: weights may be negative, which trains the model not to predict these tokens; put "
            "relu() or abs() around the formula, or signed() if this is intended"
        )
