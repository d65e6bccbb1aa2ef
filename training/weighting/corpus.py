"""Corpus statistics for formulas: thresholds, means, ranks, and moments of documents by label.

Statistics of a single score column follow exactly from the value counts in the shard set. An expression of several
columns is counted in a pass over the corpus, rounded to float16 as a stored score column would be. Statistics of
document numbers and labels are exact, from a pass over the sequence columns.
"""

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_MAX, FLOAT16_VALUES
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.text import printable, shortened
from weighted_mtp.schemas.weights.distribution import Distribution
from weighted_mtp.schemas.weights.functions import FUNCTIONS
from weighted_mtp.schemas.weights.nodes import LIVE, Call, ColumnRef, Constant, FormulaError, Node
from weighted_mtp.training.weighting.expressions import (
    Expression,
    StandardiseByLabel,
    TableLookup,
    Tokens,
    columns_read,
    evaluate_expression,
    fold,
    map_values,
)
from weighted_mtp.training.weighting.segments import OVERFLOW
from weighted_mtp.training.weighting.tables import scored_tokens

FLOAT16_NORMAL = 2.0**-14
"""Smallest float16 with full precision."""


class CorpusResolver:
    """Substitutes the statistics of zipped shard sets into formulas. Each statistic is computed once.

    `progress` makes the bar of a pass over the corpus.
    """

    def __init__(self, shards: ZippedSets, progress: MakeBar = hidden_bar) -> None:
        self.shards = shards
        self.progress = progress
        self.resolved: dict[Node, Expression] = {}
        self.counted: dict[Expression, ValueCounts] = {}

    def resolve(self, node: Node) -> Expression:
        """Replace all functions over the corpus or by label with constants and tables.

        Raises:
            UserError: a column is missing or has no score, or the argument of normalise() is never positive.
        """
        if node not in self.resolved:
            self.resolved[node] = self._resolve(node)
        return self.resolved[node]

    def _resolve(self, node: Node) -> Expression:
        if isinstance(node, Constant) or node == ColumnRef(LIVE):
            return node
        if isinstance(node, ColumnRef):
            return TableLookup(node, FLOAT16_VALUES) if self.shards.kind(node.name) == "score" else node
        arguments = tuple(self.resolve(argument) for argument in node.arguments)
        call = Call(node.function, arguments, node.numbers, node.by)
        if node.by is None:
            return fold(call)
        if node.by == "corpus":
            return self._over_corpus(call)
        if node.by not in ("sequence", "batch"):
            return self._by_label(call, node.by)
        return call

    def _over_corpus(self, call: Call) -> Expression:
        [x] = call.arguments
        if self._is_per_sequence(x):
            distribution = self._sequence_distribution(x)
        else:
            x = x if isinstance(x, TableLookup) else TableLookup(x, FLOAT16_VALUES)
            distribution = self.distribution(x)
        if not np.isfinite(distribution.values).all():
            raise UserError(f"{self.shards.first.path}: expression of {_names(x)}: {OVERFLOW}")
        over_corpus = FUNCTIONS[call.function].over_corpus
        assert over_corpus is not None
        try:
            return map_values(x, over_corpus(distribution, *call.numbers))
        except FormulaError as error:
            raise UserError(
                f"{self.shards.first.path}: {_names(x)} {error}; choose another column or formula"
            ) from None

    def distribution(self, x: TableLookup) -> Distribution:
        """Distribution of a tabulated function over all tokens that have its input scores.

        Raises:
            UserError: no token has these scores.
        """
        counts = self.counts(x.argument).counts  # (65536,)
        bits = np.flatnonzero(counts)
        bits = bits[np.isfinite(FLOAT16_VALUES[bits])]
        if not len(bits):
            raise UserError(f"{self.shards.first.path}: no token has a score in {_names(x)}; choose another column")
        return Distribution.from_values(x.table[bits], counts[bits])

    def _is_per_sequence(self, x: Expression) -> bool:
        """Whether all tokens of a sequence have the same value."""
        return all(self.shards.kind(name) != "score" for name in columns_read(x))

    def _sequence_distribution(self, x: Expression) -> Distribution:
        """Unrounded distribution, over all tokens, of an expression of sequence numbers."""
        names = columns_read(x)
        found = []
        for shard in range(len(self.shards.first.manifest.shards)):
            table = self.shards.read_sequences(shard, ["input_ids", *names])
            scored = scored_tokens(table, names)
            values = np.broadcast_to(evaluate_expression(x, scored.tokens), scored.mask.sum())
            found.append(Distribution.from_values(values, np.ones(len(values), dtype=np.int64)))
        values, counts = (np.concatenate([getattr(part, name) for part in found]) for name in ("values", "counts"))
        return Distribution.from_values(values, counts)

    def counts(self, x: Expression) -> ValueCounts:
        """Count of each float16 value: stored in the set for a score column, else from a pass over the corpus."""
        if x not in self.counted:
            if isinstance(x, ColumnRef) and self.shards.kind(x.name) == "score":
                self.counted[x] = self.shards.value_counts(x.name)
            else:
                self.counted[x] = self._count(x)
        return self.counted[x]

    def _count(self, x: Expression) -> ValueCounts:
        """Count the values of an expression in a pass over the corpus.

        Raises:
            UserError: float16 cannot tell the values apart, because they are too large or too small.
        """
        names = columns_read(x)
        counts = ValueCounts()
        largest = 0.0
        for table in self._row_groups(names):
            scored = scored_tokens(table, names)
            values = np.asarray(evaluate_expression(x, scored.tokens), dtype=np.float32)
            counts.add(values)
            largest = max(largest, float(np.abs(values).max(initial=0)))
        if largest > FLOAT16_MAX or 0 < largest < FLOAT16_NORMAL:
            raise UserError(
                f"{self.shards.first.path}: the largest value of an expression of {_names(x)} is {largest:.3g}, beyond "
                f"float16, in which it is compared over the corpus; scale it to between {FLOAT16_NORMAL:.0e} and "
                f"{FLOAT16_MAX:,.0f}"
            )
        return counts

    def _row_groups(self, names: list[str]) -> Iterator[pa.Table]:
        manifest = self.shards.first.manifest
        other_process = int(os.environ.get("RANK", "0")) > 0
        described = f"reading {', '.join(names)}"
        with self.progress(
            total=manifest.tokens,
            unit="tokens",
            unit_scale=True,
            desc=described,
            disable=other_process,
        ) as bar:
            for shard, row_group in manifest.row_groups():
                table = self.shards.read(shard, names, row_group)
                yield table
                bar.update(len(flat_values(table["input_ids"])))

    def _by_label(self, call: Call, label: str) -> Expression:
        """Standardise over the documents of each label. A document with several sequences counts once.

        Raises:
            UserError: no document with a label begins in the shards.
        """
        import polars as pl  # no other weights need it

        [x] = call.arguments
        names = columns_read(x)
        sums = []
        labels: set[str] = set()
        for shard in range(len(self.shards.first.manifest.shards)):
            table = self.shards.read_sequences(shard, ["start", label, *names])
            labels.update(table[label].unique().to_pylist())
            table = table.filter(pa.compute.equal(table["start"], 0))
            columns = {name: table[name].to_numpy() for name in names}
            values = pl.Series(np.asarray(evaluate_expression(x, Tokens(columns, {})), dtype=np.float64))
            documents = pl.DataFrame({"label": pl.Series(pl.from_arrow(table[label])), "x": values})
            sums.append(documents.group_by("label").agg(n=pl.len(), s=pl.sum("x"), q=pl.col("x").pow(2).sum()))
        total = pl.concat(sums).group_by("label").agg(pl.sum("n", "s", "q"))
        count, value_sum, squares = (total[name].to_numpy() for name in "nsq")  # (labels,)
        mean = value_sum / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        deviation[deviation < 1e-6 * np.abs(mean)] = 0  # rounding error of equal values
        inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        index = {name: number for number, name in enumerate(total["label"].to_list())}
        if without := sorted(labels - index.keys()):
            raise UserError(
                f"{self.shards.first.path}: no document with {label} '{printable(shortened(without[0]))}' begins in "
                "the set (start 0); prepare its documents again"
            )
        return StandardiseByLabel(x, label, index, mean.astype(np.float32), inverse.astype(np.float32))


def _names(x: Expression) -> str:
    return " and ".join(f"'{name}'" for name in columns_read(x))
