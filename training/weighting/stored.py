"""From stored columns to what the loader hands on: a weight for each token, or what it will be made of later."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Contrast
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.weights.language import (
    LIVE,
    POSITIVE,
    UNBOUNDED,
    Call,
    Column,
    FormulaError,
    Node,
    Number,
    Stages,
    bounds,
    columns_of,
    is_signed,
    labels_of,
    replaced,
    waits_for_batch,
)
from weighted_mtp.training.weighting.controls import Control, apply_control, shuffle_between
from weighted_mtp.training.weighting.corpus import Corpus
from weighted_mtp.training.weighting.expressions import HALVES, Expression, Lookup, evaluate
from weighted_mtp.training.weighting.tables import scored_tokens

TOO_LARGE = "--weights.formula: a weight is too large to be a number; put clip() around what grows"


@dataclass(frozen=True)
class Weighting:
    """A formula ready to use on a shard set.

    Attributes:
        formula: its text.
        columns: what it reads.
        parts: what is computed of each token: its weight, or what that is made of where it waits for the batch.
        waits: whether it does (see `training.weighting.batch`).
        control: what is made of weights that do not wait.
        missing: weight of a token without a score.
        of_sequences: whether all tokens of a sequence have the same weight.
    """

    formula: str
    columns: tuple[str, ...]
    parts: tuple[Expression, ...]
    waits: bool = False
    control: Control = "none"
    missing: float = 0.0
    of_sequences: bool = False

    def of_table(self, table: pa.Table, rng: np.random.Generator) -> np.ndarray:
        """Weights of the tokens of a table of sequences, one after the other.

        Args:
            table: `input_ids` and the columns.
            rng: for the controls.

        Returns:
            (T,) float32, `missing` where a token has no score; where weights wait for the batch, (T, parts), NaN there.

        Raises:
            UserError: a weight is not finite.
        """
        match self.parts:
            case [Lookup(of=Column(name), table=weights)] if self.control == "none" and not self.waits:
                return weights[flat_values(table[name]).view(np.uint16)]
            case [Number(value=value)] if not self.waits:
                return np.full(int(list_lengths(table["input_ids"]).sum()), value, dtype=np.float32)
        scored = scored_tokens(table, self.columns)
        if self.waits:
            parts = np.empty((len(self.parts), len(scored.mask)), dtype=np.float32)
            for values, part in zip(parts, self.parts, strict=True):
                values[:] = scored.spread(_finite(evaluate(part, scored.tokens)), math.nan)
            return parts.T
        weights = _finite(evaluate(self.parts[0], scored.tokens))
        if self.control == "shuffled" and self.of_sequences:
            weights = shuffle_between(weights, scored.counts, rng)
        else:
            weights = apply_control(self.control, weights, scored.counts, rng)
        return scored.spread(weights, self.missing)


def make_weighting(config: WeightsConfig, shards: ZippedSets, stand_in: str | None = None) -> Weighting:
    """Prepare the weights of `config` for `shards`.

    Args:
        config: the settings.
        shards: the sets that hold the columns.
        stand_in: a column that takes the place of the loss of the model in training.

    Raises:
        UserError: a column is missing, is of the wrong kind or without any score, or weights may be negative.
    """
    node = replaced(config.node, LIVE, stand_in) if stand_in else config.node
    check_formula(node, shards)
    corpus = Corpus(shards)
    waits = waits_for_batch(node)
    # In a warm-up the weights of scored tokens alone begin with 1: NaN tells the others apart.
    missing = math.nan if config.warmup_ratio else 0.0
    parts = tuple(corpus.resolve(part) for part in (Stages.of(node).stored if waits else (node,)))
    if not waits:
        _check_values(parts[0], corpus)
    scored = np.isfinite(HALVES)
    parts = tuple(Lookup(p.of, np.where(scored, p.table, missing)) if isinstance(p, Lookup) else p for p in parts)
    columns = (*columns_of(node), *labels_of(node))
    of_sequences = all(shards.kind(name) != "score" for name in columns)
    return Weighting(config.text, columns, parts, waits, config.control, missing, of_sequences)


def check_formula(node: Node, shards: ZippedSets) -> None:
    """Check a formula against the columns that there are, without a look at the data.

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
            raise UserError(f"{where}: '{name}' holds labels, of which no weight can be made; use them with by={name}")
        if kind == "score":
            values = shards.value_counts(name).distinct()[0]
            if not len(values):
                raise UserError(f"{where}: column '{name}' has no score at all; choose another --weights.column")
            if not values.any():
                raise UserError(f"{where}: column '{name}' has no value but 0; choose another --weights.column")


def _check_labels(node: Node, shards: ZippedSets) -> None:
    """Raise UserError unless what is done by label is done to numbers, by labels."""
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
                    f"{shards.holder(name).path}: '{name}' is no column of {kind}s of documents, which "
                    f"standardise(by={label}) needs; prepare the corpus with --{kind}_fields"
                )


def _finite(weights: np.ndarray) -> np.ndarray:
    if not np.isfinite(weights).all():
        raise UserError(TOO_LARGE)
    return weights


def _check_values(weights: Expression, corpus: Corpus) -> None:
    """Raise UserError if weights are known to be 0 for every token, or too large for one."""
    values = np.array([1.0])
    if isinstance(weights, Number):
        values = np.array([weights.value])
    elif isinstance(weights, Lookup) and isinstance(weights.of, Column):
        values = corpus.distribution(weights).values
    if not _finite(values).any():
        raise UserError("--weights: are 0 for every token, so there is nothing to learn; choose others")


def _check_sign(node: Node, shards: ZippedSets) -> None:
    def of_column(name: str) -> tuple[float, float]:
        column = shards.holder(name).manifest.columns.get(name)
        return UNBOUNDED if column is None or isinstance(column.origin, Contrast) else POSITIVE

    try:
        low, _ = bounds(node, of_column)
    except FormulaError as error:
        raise UserError(f"--weights.formula: {error}") from None
    if low < 0 and not is_signed(node):
        raise UserError(
            "--weights.formula: weights may be negative, which would teach the model not to predict these tokens; put "
            "relu() or abs() around the formula, or signed() where that is meant"
        )
