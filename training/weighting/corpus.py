"""What a formula has to know about the whole corpus: thresholds, means, ranks, and statistics of labelled documents.

What depends on one score column alone follows exactly from the set's value counts, without a look at the data. What
combines several is counted in a pass of its own, rounded to float16: what it would be if it were a score column.
Numbers of documents, and labels, take an exact pass over the columns of sequences.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.weights.language import LIVE, Call, Column, Node, Number
from weighted_mtp.training.weighting.expressions import (
    HALVES,
    ByLabel,
    Expression,
    Lookup,
    Ranked,
    Tokens,
    columns_read,
    evaluate,
    fold,
)
from weighted_mtp.training.weighting.segments import half_bits
from weighted_mtp.training.weighting.tables import scored_tokens


@dataclass(frozen=True)
class Distribution:
    """Distinct finite values, ascending (D,) float64, and how often each occurs in the corpus (D,) int64."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> "Distribution":
        """From values (N,) in any order, with repetitions, and how often each occurs (N,)."""
        distinct, index = np.unique(values.astype(np.float64), return_inverse=True)
        total = np.zeros(len(distinct), dtype=np.int64)
        np.add.at(total, index, counts)
        return cls(distinct, total)

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return float(self.values @ self.counts / self.counts.sum())

    @property
    def deviation(self) -> float:
        """Standard deviation over all tokens."""
        return float(np.sqrt((self.values - self.mean) ** 2 @ self.counts / self.counts.sum()))

    def threshold(self, fraction: float) -> float:
        """The largest value that at least a `fraction` of all values reach."""
        reach = np.cumsum(self.counts[::-1])[::-1]
        return float(self.values[np.flatnonzero(reach >= np.ceil(fraction * self.counts.sum() - 1e-9))[-1]])

    @property
    def ranks(self) -> np.ndarray:
        """Share of all values that are not larger than each of `values`."""
        return np.cumsum(self.counts) / self.counts.sum()


class Corpus:
    """Finds out about zipped shard sets what formulas need to know, each thing once."""

    def __init__(self, shards: ZippedSets) -> None:
        self.shards = shards
        self.resolved: dict[Node, Expression] = {}
        self.counted: dict[Expression, ValueCounts] = {}

    def resolve(self, node: Node) -> Expression:
        """The formula with numbers and tables in place of everything that is done over the corpus or by label.

        Raises:
            UserError: a column is missing or has no score, or something without a positive value is normalised.
        """
        if node not in self.resolved:
            self.resolved[node] = self._resolve(node)
        return self.resolved[node]

    def _resolve(self, node: Node) -> Expression:
        if isinstance(node, Number) or node == Column(LIVE):
            return node
        if isinstance(node, Column):
            return Lookup(node, HALVES) if self.shards.kind(node.name) == "score" else node
        arguments = tuple(self.resolve(argument) for argument in node.arguments)
        call = Call(node.function, arguments, node.numbers, node.by)
        if node.by is None:
            return fold(call)
        if node.by == "corpus":
            return self._over_corpus(call)
        if node.by in ("sequence", "batch"):
            [x] = arguments
            if node.function in ("top", "rank") and isinstance(x, Lookup):  # ranked as float16, so looked up as such
                halves = Lookup(x.of, half_bits(x.table).view(np.float16))
                return Call(node.function, (halves,), node.numbers, node.by)
            return call
        return self._by_label(call, node.by)

    def _over_corpus(self, call: Call) -> Expression:
        [x] = call.arguments
        if self._is_of_sequences(x):
            seen = self._of_sequences(x)
        else:
            x = x if isinstance(x, Lookup) else Lookup(x, HALVES)
            seen = self.distribution(x)
        match call.function:
            case "top":
                fraction, of_magnitudes = call.numbers
                threshold = seen.threshold(fraction)
                comparison = ">" if of_magnitudes and threshold == 0 and fraction < 1 else ">="
                return arithmetic(comparison, x, threshold)
            case "rank":
                shares = seen.ranks.astype(np.float32)
                ranked = Ranked(x, seen.values.astype(np.float32), shares)
                if isinstance(x, Lookup):
                    index = np.searchsorted(ranked.values, x.table).clip(max=len(shares) - 1)
                    return Lookup(x.of, shares[index])
                return ranked
            case "standardise":
                return arithmetic("*", arithmetic("-", x, seen.mean), 1 / seen.deviation if seen.deviation else 0.0)
            case "softmax":
                largest = float(seen.values[-1])
                mean = Distribution(np.exp(seen.values - largest), seen.counts).mean
                shifted = arithmetic("-", x, largest)
                return arithmetic("*", fold(Call("exp", (shifted,))), 1 / mean)
        assert call.function == "normalise"
        if seen.mean == 0:
            raise UserError(
                f"{self.shards.first.path}: --weights are 0 for every token, as nothing of {_names(x)} is positive; "
                "choose another column or formula"
            )
        return arithmetic("*", x, 1 / seen.mean)

    def distribution(self, x: Lookup) -> Distribution:
        """The values of a function of one value over all tokens that have the scores it is made of.

        Raises:
            UserError: no token has them.
        """
        counts = self.counts(x.of).counts
        bits = np.flatnonzero(counts)
        bits = bits[np.isfinite(HALVES[bits])]
        if not len(bits):
            raise UserError(f"{self.shards.first.path}: no token has a score in {_names(x)}; choose another column")
        return Distribution.of(x.table[bits], counts[bits])

    def _is_of_sequences(self, x: Expression) -> bool:
        """Whether all tokens of a sequence have the same value."""
        return all(self.shards.kind(name) != "score" for name in columns_read(x))

    def _of_sequences(self, x: Expression) -> Distribution:
        """The values of an expression of numbers of sequences, not rounded."""
        names = list(dict.fromkeys(columns_read(x)))
        found = []
        for shard in range(len(self.shards.first.manifest.shards)):
            table = self.shards.read_sequences(shard, ["input_ids", *names])
            scored = scored_tokens(table, names)
            values = np.broadcast_to(evaluate(x, scored.tokens), scored.mask.sum())
            found.append(Distribution.of(values, np.ones(len(values), dtype=np.int64)))
        values, counts = (np.concatenate([getattr(part, name) for part in found]) for name in ("values", "counts"))
        return Distribution.of(values, counts)

    def counts(self, x: Expression) -> ValueCounts:
        """How often each float16 occurs: as the set says for a score column, else by a pass over the corpus."""
        if x not in self.counted:
            if isinstance(x, Column) and self.shards.kind(x.name) == "score":
                self.counted[x] = self.shards.value_counts(x.name)
            else:
                self.counted[x] = self._count(x)
        return self.counted[x]

    def _count(self, x: Expression) -> ValueCounts:
        names = list(dict.fromkeys(columns_read(x)))
        counts = ValueCounts()
        for table in self._row_groups(names):
            scored = scored_tokens(table, names)
            values = np.asarray(evaluate(x, scored.tokens), dtype=np.float32)
            counts.add(half_bits(values).view(np.float16))
        return counts

    def _row_groups(self, names: list[str]) -> Iterator[pa.Table]:
        shards = self.shards.first.manifest.shards
        other_process = int(os.environ.get("RANK", "0")) > 0
        described = f"reading {', '.join(names)}"
        with ProgressBar(
            total=self.shards.first.manifest.tokens, unit="tok", unit_scale=True, desc=described, disable=other_process
        ) as bar:
            for number, shard in enumerate(shards):
                for row_group in range(shard.row_groups):
                    table = self.shards.read(number, names, row_group)
                    yield table
                    bar.update(len(table["input_ids"].combine_chunks().flatten()))

    def _by_label(self, call: Call, label: str) -> Expression:
        """Standardise over the documents of each label; one that is several sequences counts once."""
        [x] = call.arguments
        names = list(dict.fromkeys(columns_read(x)))
        parts = []
        for shard in range(len(self.shards.first.manifest.shards)):
            table = self.shards.read_sequences(shard, ["start", label, *names])
            table = table.filter(pa.compute.equal(table["start"], 0))
            columns = {read: table[read].to_numpy() for read in names}
            values = pl.Series(np.asarray(evaluate(x, Tokens(columns, {})), dtype=np.float64))
            documents = pl.DataFrame({"label": pl.Series(pl.from_arrow(table[label])), "x": values})
            parts.append(documents.group_by("label").agg(n=pl.len(), s=pl.sum("x"), q=pl.col("x").pow(2).sum()))
        found = pl.concat(parts).group_by("label").agg(pl.sum("n", "s", "q"))
        count, total, squares = (found[name].to_numpy() for name in "nsq")
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        deviation[deviation < 1e-6 * np.abs(mean)] = 0  # what rounding leaves of equal values
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        numbers = {name: number for number, name in enumerate(found["label"].to_list())}
        return ByLabel(x, label, numbers, mean.astype(np.float32), scale.astype(np.float32))


def arithmetic(operator: str, x: Expression, number: float) -> Expression:
    """An operation on an expression and a number."""
    return fold(Call(operator, (x, Number(number))))


def _names(x: Expression) -> str:
    return " and ".join(f"'{name}'" for name in dict.fromkeys(columns_read(x)))
