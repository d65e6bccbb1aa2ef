"""Several shard sets of one corpus read as one: the same rows, with the score columns of all of them.

That the rows are the same is checked twice: when the sets are opened, what their manifests say about tokenizer and
shards; when a row group is read, the token ids themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import pyarrow as pa

from schemas.errors import UserError
from schemas.locations import Location
from schemas.manifest import Manifest, same_origin
from schemas.shard_set import ShardSet

REMEDY = "give sets that were scored from the same token shards"


@dataclass(frozen=True)
class ZippedSets:
    """One shard set or several of the same rows.

    Raises:
        UserError: two sets differ in tokenizer or shards, or hold different columns under one name.
    """

    sets: tuple[ShardSet, ...]

    def __post_init__(self) -> None:
        for one, other in combinations(self.sets, 2):
            check_same_corpus(one, other)
            check_columns(one, other)

    @classmethod
    def open(cls, paths: Iterable[str | Location]) -> "ZippedSets":
        """Open the sets in `paths`.

        Raises:
            UserError: one cannot be opened, or two do not fit together.
        """
        return cls(tuple(ShardSet.open(path) for path in paths))

    @property
    def first(self) -> ShardSet:
        """The set that stands for all in what they share: tokenizer, shards and their row groups, token ids."""
        return self.sets[0]

    @property
    def digest(self) -> str:
        """Identity of the sets: their digests, in order, separated by commas."""
        return ",".join(shards.manifest.digest for shards in self.sets)

    def holder(self, column: str) -> ShardSet:
        """The first set that has the score column `column`.

        Raises:
            UserError: none has it.
        """
        for shards in self.sets:
            if column in shards.manifest.columns:
                return shards
        held = " or ".join(f"{s.path} (score columns: {', '.join(s.manifest.columns) or 'none'})" for s in self.sets)
        raise UserError(f"no column '{column}' in {held}; add it with 'wmtp score'")

    def files(self, shard: int, column: str | None) -> list[Location]:
        """The files that `read` reads for shard `shard` and score column `column`."""
        holder = self.holder(column) if column else self.first
        sets = [self.first] if holder is self.first else [self.first, holder]
        return [shards.path / shards.manifest.shards[shard].name for shards in sets]

    def read(self, shard: int, column: str | None, row_group: int) -> pa.Table:
        """Read `input_ids` of one row group, and the score column `column` unless it is None.

        Only the first set and the one that holds the column are read.

        Raises:
            UserError: no set has the column, a shard is damaged, or the two sets differ in token ids.
        """
        holder = self.holder(column) if column else self.first
        table = holder.read(shard, ["input_ids", column] if column else ["input_ids"], row_group)
        if holder is not self.first:
            expected = self.first.read(shard, ["input_ids"], row_group)
            if not table["input_ids"].equals(expected["input_ids"]):
                first, other = (s.path / s.manifest.shards[shard].name for s in (self.first, holder))
                raise UserError(f"{other}: other input_ids than in {first} (row group {row_group}); {REMEDY}")
        return table


def check_same_corpus(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError unless the manifests of two sets agree in tokenizer, shards, and how much each shard holds."""
    if difference := corpus_difference(one.manifest, other.manifest):
        raise UserError(f"{other.path}: not the same corpus as {one.path} ({difference}); {REMEDY}")


def corpus_difference(one: Manifest, other: Manifest) -> str | None:
    """How `other` differs from `one` in tokenizer, sequence columns or the size of a shard, None where they agree."""
    if one.tokenizer.fingerprint != other.tokenizer.fingerprint:
        return f"another tokenizer: {other.tokenizer.name}, not {one.tokenizer.name}"
    if len(one.shards) != len(other.shards):
        return f"{len(other.shards)} shards instead of {len(one.shards)}"
    if one.corpus.sequence_columns != other.corpus.sequence_columns:
        return f"sequence columns {other.corpus.describe_columns()} instead of {one.corpus.describe_columns()}"
    for a, b in zip(one.shards, other.shards, strict=True):
        for quantity in ("rows", "tokens", "row_groups"):
            if getattr(a, quantity) != getattr(b, quantity):
                there, here = getattr(b, quantity), getattr(a, quantity)
                return f"{b.name} has {there:,} {quantity.replace('_', ' ')} instead of {here:,}"
    return None


def check_columns(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError where columns of one name hold different numbers.

    A contrast says only which columns were subtracted; they lie in the same set, under names that are compared too.
    """
    for name, column in one.manifest.columns.items():
        if name in other.manifest.columns and not same_origin(column.origin, other.manifest.columns[name].origin):
            raise UserError(
                f"{one.path} and {other.path}: both have a column '{name}', of different origin; "
                "give one of them another name with 'wmtp score --suffix'"
            )
