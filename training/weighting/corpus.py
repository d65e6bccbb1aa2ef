"""What a formula has to know about the whole corpus: thresholds, means, ranks, and statistics of labelled documents.

All of it is exact. What depends on one score column alone follows from the set's value counts, without a look at the
data. Anything else is counted in one pass, rounded to float16: what it would be if it were a score column. Labels take
a pass over the columns of sequences.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from schemas.errors import UserError
from schemas.formulas import LIVE, Call, Column, Node, Number
from schemas.value_counts import ValueCounts
from schemas.zipped import ZippedSets
from training.weighting.expressions import (
    HALVES,
    ByLabel,
    Expression,
    Lookup,
    Tokens,
    columns_read,
    evaluate,
    fold,
    over_values,
)
from training.weighting.segments import half_bits
from training.weighting.tables import scored_tokens


@dataclass(frozen=True)
class Distribution:
    """Distinct finite values, ascending (D,) float64, and how often each occurs in the corpus (D,) int64."""

    values: np.ndarray
    counts: np.ndarray

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

    def ranks(self, values: np.ndarray) -> np.ndarray:
        """Share of all values that are not larger than each of `values`."""
        not_larger = np.append(0, np.cumsum(self.counts))
        return not_larger[np.searchsorted(self.values, values, side="right")] / self.counts.sum()


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
        [argument] = call.arguments
        x = argument if isinstance(argument, Lookup) else Lookup(argument, HALVES)
        seen = self.distribution(x)

        def function_of_x(function: Callable[[np.ndarray], np.ndarray]) -> Expression:
            with np.errstate(all="ignore"):  # of NaN and infinity, which no scored token has
                return over_values(x.of, function(x.table))

        match call.function:
            case "top":
                threshold = seen.threshold(*call.numbers)
                return function_of_x(lambda values: values >= np.float32(threshold))
            case "rank":
                return function_of_x(seen.ranks)
            case "standardise":
                scale = 1 / seen.deviation if seen.deviation else 0.0
                return function_of_x(lambda values: (values - seen.mean) * scale)
            case "softmax":
                largest = seen.values[-1]
                mean = Distribution(np.exp(seen.values - largest), seen.counts).mean
                return function_of_x(lambda values: np.exp(values - largest) / mean)
        assert call.function == "normalise"
        if seen.mean == 0:
            raise UserError(
                f"{self.shards.first.path}: --weights are 0 for every token, as nothing of {_names(x)} is positive; "
                "choose another column or formula"
            )
        return function_of_x(lambda values: values / seen.mean)

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
        values, index = np.unique(x.table[bits].astype(np.float64), return_inverse=True)
        total = np.zeros(len(values), dtype=np.int64)
        np.add.at(total, index, counts[bits])
        return Distribution(values, total)

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
        with tqdm(
            total=self.shards.first.manifest.tokens, unit="tok", unit_scale=True, desc=described, disable=other_process
        ) as bar:
            for number, shard in enumerate(shards):
                for row_group in range(shard.row_groups):
                    table = self.shards.read(number, names, row_group)
                    yield table
                    bar.update(len(table["input_ids"].combine_chunks().flatten()))

    def _by_label(self, call: Call, label: str) -> Expression:
        """Standardise over the documents of each label; one that is several sequences counts once.

        Raises:
            UserError: it is made of scores of tokens, or the set does not have the labels.
        """
        [x] = call.arguments
        names = list(dict.fromkeys(columns_read(x)))
        for name, kind in [(label, "label"), *((name, "number") for name in names)]:
            if self.shards.kind(name) != kind:
                raise UserError(
                    f"{self.shards.first.path}: '{name}' is no column of {kind}s of documents, which standardise(by="
                    f"{label}) needs; prepare the corpus with --{kind}_fields"
                )
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


def _names(x: Expression) -> str:
    return " and ".join(f"'{name}'" for name in dict.fromkeys(columns_read(x)))
