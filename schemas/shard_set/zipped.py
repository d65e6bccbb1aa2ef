"""Several shard sets of one corpus, read as one set with all their columns.

Two checks ensure that the sets have the same rows: opening compares tokenizer and shards in the manifests, and reading
compares the sets that are read: the token ids of a row group, or `document_id` and `start` of a whole shard, and the
values of sequence columns that several of these sets hold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from typing import Literal

import pyarrow as pa

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import (
    TOKEN_COLUMNS,
    Imported,
    ImportedValues,
    Manifest,
    SequenceKind,
    same_origin,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.value_counts import ValueCounts
from weighted_mtp.schemas.storage.locations import Location

SomeSets = ShardSet | Location | str | Sequence[ShardSet | Location | str]
"""One shard set or several with the same rows, open or by path."""

REMEDY = "give sets that were scored from the same token shards"
RENAME = "import one of them under another name"


@dataclass(frozen=True)
class ZippedSets:
    """One or more shard sets with the same rows.

    Raises:
        UserError: two sets differ in tokenizer or shards, or have different columns of the same name.
    """

    sets: tuple[ShardSet, ...]
    _counts: dict[Location, dict[str, ValueCounts]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for one, other in combinations(self.sets, 2):
            check_same_corpus(one, other)
            check_columns(one, other)

    @classmethod
    def open(cls, paths: Iterable[str | Location]) -> "ZippedSets":
        """Open the sets in `paths`.

        Raises:
            UserError: a set cannot be opened, or two sets do not match.
        """
        return cls(tuple(ShardSet.open(path) for path in paths))

    @classmethod
    def of(cls, sets: SomeSets) -> "ZippedSets":
        """Zip open sets, and sets to open.

        Raises:
            UserError: as for `open`, or there is none.
        """
        each = [sets] if isinstance(sets, ShardSet | Location | str) else sets
        if not each:
            raise UserError("no shard set is given; give at least one")
        return cls(tuple(one if isinstance(one, ShardSet) else ShardSet.open(one) for one in each))

    @property
    def first(self) -> ShardSet:
        """The first set. All sets share its tokenizer, shards, row groups and token ids."""
        return self.sets[0]

    @property
    def sequence_columns(self) -> dict[str, SequenceKind]:
        """Sequence columns of all sets, and their kinds."""
        kinds: dict[str, SequenceKind] = {}
        for shards in self.sets:
            kinds |= shards.manifest.corpus.sequence_columns
        return kinds

    @property
    def digest(self) -> str:
        """Identity of the sets: their digests in order, separated by commas."""
        return ",".join(shards.manifest.digest for shards in self.sets)

    def holder(self, column: str) -> ShardSet:
        """The first set that has the score or sequence column `column`.

        Raises:
            UserError: no set has it.
        """
        for shards in self.sets:
            if column in shards.manifest.columns or column in shards.manifest.corpus.sequence_columns:
                return shards
        held = {s.path: ", ".join([*s.manifest.columns, *s.manifest.corpus.sequence_columns]) for s in self.sets}
        places = " or ".join(f"{path} (columns: {names or 'none'})" for path, names in held.items())
        known = [name for s in self.sets for name in (*s.manifest.columns, *s.manifest.corpus.sequence_columns)]
        meant = get_close_matches(column, known, n=1)
        hint = f" (did you mean '{meant[0]}'?)" if meant else ""
        raise UserError(
            f"no column '{column}'{hint} in {places}; add it with 'wmtp score' or 'wmtp import', "
            "or from the corpus with 'wmtp prepare --number_fields' or '--label_fields'"
        )

    def kind(self, column: str) -> Literal["score", "number", "label"]:
        """Kind of a column: a score per token, or a number or a label per sequence.

        Raises:
            UserError: no set has it.
        """
        manifest = self.holder(column).manifest
        return "score" if column in manifest.columns else manifest.corpus.sequence_columns[column]

    def value_counts(self, column: str) -> ValueCounts:
        """Exact value counts of a score column, cached per set.

        Raises:
            UserError: no set has it, or its statistics are missing.
        """
        holder = self.holder(column)
        if holder.path not in self._counts:
            self._counts[holder.path] = holder.value_counts()
        return self._counts[holder.path][column]

    def files(self, shard: int, columns: Iterable[str]) -> list[Location]:
        """Files that `read` opens for shard `shard` and these columns."""
        return [shards.file(shard).path for shards, _ in self._holders(columns)]

    def read(self, shard: int, columns: Sequence[str], row_group: int) -> pa.Table:
        """Read `input_ids` and these columns of one row group.

        Reads only the first set and the sets that hold the columns.

        Raises:
            UserError: no set has a column, a shard is damaged, or two sets differ in token ids or in a column.
        """
        return self._join(shard, ["input_ids"], columns, row_group)

    def read_sequences(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Read sequence columns, and any of `TOKEN_COLUMNS`, of a whole shard.

        Reads only the first set and the sets that hold the columns.

        Raises:
            UserError: no set has a column, a shard is damaged, or two sets differ in `document_id`, `start` or in a
                column.
        """
        tokens = [name for name in columns if name in TOKEN_COLUMNS]
        others = [name for name in columns if name not in TOKEN_COLUMNS]
        keys = tokens if len(self._holders(others)) == 1 else list(dict.fromkeys(["document_id", "start", *tokens]))
        return self._join(shard, keys, others).select(list(columns))

    def _join(self, shard: int, keys: Sequence[str], columns: Sequence[str], row_group: int | None = None) -> pa.Table:
        """Read columns where they lie, and the `keys`, in which all sets that are read must agree."""
        (first, held), *others = self._holders(columns)
        table = first.read(shard, [*keys, *held], row_group)
        for holder, held in others:
            again = [name for name in columns if name in holder.manifest.corpus.sequence_columns and name not in held]
            part = holder.read(shard, [*keys, *held, *again], row_group)
            for name in (*keys, *again):
                if not part[name].equals(table[name]):
                    earlier, remedy = (first, REMEDY) if name in keys else (self.holder(name), RENAME)
                    here, there = (shards.file(shard).path for shards in (earlier, holder))
                    group = "" if row_group is None else f" (row group {row_group})"
                    raise UserError(f"{there}: column '{name}' differs from {here}{group}; {remedy}")
            for name in held:
                table = table.append_column(name, part[name])
        return table

    def _holders(self, columns: Iterable[str]) -> list[tuple[ShardSet, list[str]]]:
        """The first set and all sets to read for these columns, each with the columns to take from it.

        A sequence column that several sets hold is compared in all of them.
        """
        columns = list(columns)
        holders = []
        for shards in self.sets:
            taken = [name for name in columns if self.holder(name) is shards]
            if taken or shards is self.first or not shards.manifest.corpus.sequence_columns.keys().isdisjoint(columns):
                holders.append((shards, taken))
        return holders


def check_same_corpus(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError unless the manifests of two sets agree in tokenizer, shards, and the size of each shard."""
    if difference := corpus_difference(one.manifest, other.manifest):
        raise UserError(f"{other.path}: not the same corpus as {one.path} ({difference}); {REMEDY}")


def corpus_difference(one: Manifest, other: Manifest) -> str | None:
    """The first difference of `other` from `one` in tokenizer or shard sizes, or None."""
    if one.tokenizer.fingerprint != other.tokenizer.fingerprint:
        return f"another tokenizer: {other.tokenizer.name}, not {one.tokenizer.name}"
    if len(one.shards) != len(other.shards):
        return f"{len(other.shards)} shards instead of {len(one.shards)}"
    for a, b in zip(one.shards, other.shards, strict=True):
        for quantity in ("rows", "tokens", "row_groups"):
            if getattr(a, quantity) != getattr(b, quantity):
                there, here = getattr(b, quantity), getattr(a, quantity)
                return f"{b.name} has {there:,} {quantity.replace('_', ' ')} instead of {here:,}"
    return None


def check_columns(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError if two columns of the same name have different kinds, or are scores of different origins.

    A contrast names two columns of its own set, so comparing all columns also compares these. The values of sequence
    columns are compared when they are read.
    """
    here, there = (
        dict.fromkeys(shards.manifest.columns, "score") | shards.manifest.corpus.sequence_columns
        for shards in (one, other)
    )
    for name, kind in here.items():
        if there.get(name, kind) != kind:
            raise UserError(
                f"{one.path} and {other.path}: both have a column '{name}', a {kind} and a {there[name]}; {RENAME}"
            )
    for name, column in one.manifest.columns.items():
        if name in other.manifest.columns and not same_origin(column.origin, other.manifest.columns[name].origin):
            origins = (column.origin, other.manifest.columns[name].origin)
            imported = any(isinstance(origin, Imported | ImportedValues) for origin in origins)
            remedy = RENAME if imported else "give one of them another name with 'wmtp score --suffix'"
            raise UserError(f"{one.path} and {other.path}: both have a column '{name}', of different origin; {remedy}")
