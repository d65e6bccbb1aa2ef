"""Columns of score rows in the order of a shard set."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import SequenceKind
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import list_column, shard_schema, split_by_tokens
from weighted_mtp.scoring.imports.matching import Matches
from weighted_mtp.scoring.imports.score_rows import Lists, ScoreRows
from weighted_mtp.scoring.imports.sources import Kind

HASHED_TOKENS = 1 << 20
"""Tokens hashed at once."""


@dataclass(frozen=True)
class NewColumns:
    """The columns of score rows, and the row of each sequence of a set."""

    source: ShardSet
    kinds: Mapping[str, Kind]
    rows: ScoreRows
    matches: Matches

    @property
    def score_columns(self) -> tuple[str, ...]:
        """The columns with one value for each token."""
        return tuple(self.rows.lists)

    @property
    def sequence_columns(self) -> dict[str, SequenceKind]:
        """Kinds of the columns with one value for each sequence."""
        return {name: kind for name, kind in self.kinds.items() if kind != "score"}

    def check_documents(self) -> None:
        """Check the columns with one value for each document.

        Raises:
            UserError: a document has no value, or different ones.
        """
        where = self.rows.sources[0].name
        for name in self.sequence_columns:
            values = self.rows.numbers[name] if name in self.rows.numbers else self.rows.labels[name]
            series = pl.Series(values)
            value = series.fill_nan(None) if series.dtype.is_float() else series
            found = value.gather(pl.Series(self.matches.rows).replace(-1, None))
            documents = pl.DataFrame({"document": self.matches.documents, "value": found})
            if missing := documents.filter(found.is_null())["document"].unique(maintain_order=True).to_list():
                raise UserError(
                    f"{where}: '{name}' has no value for {len(missing):,} documents of {self.source.path} "
                    f"(first: {missing[0]!r:.80}); every document needs one"
                )
            differ = documents.group_by("document", maintain_order=True).agg(pl.col("value").n_unique())
            for document in differ.filter(pl.col("value") > 1)["document"].head(1):
                raise UserError(
                    f"{where}: '{name}' differs between rows of document {document!r:.80}; "
                    "give one value for each document"
                )

    def append(self, table: pa.Table, first: int) -> pa.Table:
        """Append the columns to a shard whose first sequence is number `first` of the set."""
        end = first + table.num_rows
        for name, kind in self.kinds.items():
            if kind == "score":
                column = list_column(self._scores(name, first, end), self.matches.lengths[first:end])
            else:
                column = self._sequence_values(name, first, end)
            table = table.append_column(name, column)
        manifest = self.source.manifest
        order = shard_schema(
            (*manifest.columns, *self.score_columns), {**manifest.corpus.sequence_columns, **self.sequence_columns}
        )
        return table.select(order.names)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the values of each column, in the order of the set, whatever the order of the rows.

        Hashed are scores as float16 and numbers as float32, both little-endian, NaN as 0x7e00; labels as UTF-8, each
        after its length as uint64.
        """
        return {name: self._digest(name) for name in self.kinds}

    def _digest(self, name: str) -> str:
        sha256 = hashlib.sha256()
        for first, end in split_by_tokens(self.matches.lengths, HASHED_TOKENS):
            if self.kinds[name] == "score":
                sha256.update(self._scores(name, first, end).astype("<f2").tobytes())
            elif self.kinds[name] == "number":
                sha256.update(self._sequence_values(name, first, end).to_numpy().astype("<f4").tobytes())
            else:
                for label in self._sequence_values(name, first, end).to_pylist():
                    sha256.update(len(label.encode()).to_bytes(8, "little") + label.encode())
        return sha256.hexdigest()

    def _scores(self, name: str, first: int, end: int) -> np.ndarray:
        """Scores of the sequences `first` to `end`, float16 [tokens]."""
        matches = self.matches
        return gather(
            self.rows.lists[name], matches.rows[first:end], matches.offsets[first:end], matches.lengths[first:end]
        )

    def _sequence_values(self, name: str, first: int, end: int) -> pa.Array | pa.ChunkedArray:
        rows = self.matches.rows[first:end]
        if name in self.rows.numbers:
            return pa.array(self.rows.numbers[name][rows])
        return self.rows.labels[name].take(pa.array(rows))


def gather(lists: Lists, rows: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Scores of sequences.

    Args:
        lists: lists of all rows.
        rows: row of each sequence, or -1, int64 [sequences].
        offsets: index of each sequence's first token in its list, int64 [sequences].
        lengths: tokens of each sequence, int64 [sequences].

    Returns:
        float16 [tokens of all sequences], NaN where a sequence has no list.
    """
    has_list = (rows >= 0) & (lists.lengths[rows] >= 0)
    starts = lists.first[rows] + offsets - (np.cumsum(lengths) - lengths)
    known = np.repeat(has_list, lengths)
    index = np.repeat(starts, lengths) + np.arange(lengths.sum())
    scores = np.full(len(index), np.nan, np.float16)
    scores[known] = lists.values[index[known]]
    return scores
