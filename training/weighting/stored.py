"""From stored columns to what the loader hands on: a weight for each token, or what it will be made of later."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from schemas.configs import WeightsConfig
from schemas.errors import UserError
from schemas.formulas import (
    POSITIVE,
    UNBOUNDED,
    Call,
    Column,
    FormulaError,
    Node,
    Number,
    bounds,
    columns_of,
    labels_of,
    waits_for_batch,
)
from schemas.manifest import Contrast
from schemas.shards import flat_values, list_lengths
from schemas.zipped import ZippedSets
from training.weighting.controls import Control, apply_control
from training.weighting.corpus import Corpus
from training.weighting.expressions import Expression, Lookup, evaluate
from training.weighting.tables import scored_tokens


@dataclass(frozen=True)
class Weighting:
    """A formula ready to use on a shard set.

    Attributes:
        formula: its text.
        columns: what it reads.
        parts: what is computed of each token: its weight, or what that is made of where it waits for the batch.
        waits: whether it does (see `training.weighting.batch`).
        control: what is made of weights that do not wait.
    """

    formula: str
    columns: tuple[str, ...]
    parts: tuple[Expression, ...]
    waits: bool = False
    control: Control = "none"

    def of_table(self, table: pa.Table, rng: np.random.Generator) -> np.ndarray:
        """Weights of the tokens of a table of sequences, one after the other.

        Args:
            table: `input_ids` and the columns.
            rng: for the controls.

        Returns:
            (T,) float32, 0 where a token has no score; where weights wait for the batch, (T, parts), NaN there.
        """
        match self.parts:
            case [Lookup(of=Column(name), table=weights)] if self.control == "none" and not self.waits:
                return weights[flat_values(table[name]).view(np.uint16)]
            case [Number(value=value)] if not self.waits:
                return np.full(int(list_lengths(table["input_ids"]).sum()), value, dtype=np.float32)
        scored = scored_tokens(table, self.columns)
        if self.waits:
            parts = np.full((len(self.parts), len(scored.mask)), np.nan, dtype=np.float32)
            for values, part in zip(parts, self.parts, strict=True):
                values[scored.mask] = evaluate(part, scored.tokens)
            return parts.T
        weights = evaluate(self.parts[0], scored.tokens)
        return scored.spread(apply_control(self.control, weights, scored.counts, rng))


def make_weighting(config: WeightsConfig, shards: ZippedSets, stand_in: str | None = None) -> Weighting:
    """Prepare the weights of `config` for `shards`.

    Args:
        config: the settings.
        shards: the sets that hold the columns.
        stand_in: a column that takes the place of the loss of the model in training.

    Raises:
        UserError: a column is missing, is of the wrong kind or without any score, or weights may be negative.
    """
    node = replaced(config.node, stand_in) if stand_in else config.node
    columns = (*columns_of(node), *labels_of(node))
    check_formula(node, shards)
    corpus = Corpus(shards)
    waits = waits_for_batch(node)
    parts = tuple(corpus.resolve(part) for part in (split(node)[1] if waits else [node]))
    finite = np.isfinite(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    parts = tuple(Lookup(p.of, np.where(finite, p.table, 0)) if isinstance(p, Lookup) else p for p in parts)
    return Weighting(config.text, columns, parts, waits, config.control)


def split(node: Node) -> tuple[Node, list[Node]]:
    """What waits for the batch, with columns "0", "1", ... in place of its parts that do not, and these parts."""
    parts: list[Node] = []

    def replace(node: Node) -> Node:
        if isinstance(node, Number):
            return node
        if not waits_for_batch(node):
            if node not in parts:
                parts.append(node)
            return Column(str(parts.index(node)))
        if isinstance(node, Column):
            return node
        return Call(node.function, tuple(map(replace, node.arguments)), node.numbers, node.by)

    return replace(node), parts


def replaced(node: Node, stand_in: str) -> Node:
    """The formula with a column in place of the loss of the model in training."""
    if node == Column("live"):
        return Column(stand_in)
    if isinstance(node, Call):
        return Call(node.function, tuple(replaced(a, stand_in) for a in node.arguments), node.numbers, node.by)
    return node


def check_formula(node: Node, shards: ZippedSets) -> None:
    """Check a formula against the columns that there are, without a look at the data.

    Raises:
        UserError: a column is missing, is of the wrong kind or without any score, or weights may be negative.
    """
    for name in labels_of(node):
        shards.holder(name)
    _check_columns(node, shards)
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


def _check_sign(node: Node, shards: ZippedSets) -> None:

    def of_column(name: str) -> tuple[float, float]:
        column = shards.holder(name).manifest.columns.get(name)
        return UNBOUNDED if column is None or isinstance(column.origin, Contrast) else POSITIVE

    try:
        low, _ = bounds(node, of_column)
    except FormulaError as error:
        raise UserError(f"--weights.formula: {error}") from None
    if low < 0 and not (isinstance(node, Call) and node.function == "signed"):
        raise UserError(
            "--weights.formula: weights may be negative, which would teach the model not to predict these tokens; put "
            "relu() or abs() around the formula, or signed() where that is meant"
        )
