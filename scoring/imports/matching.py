"""Which score row belongs to which sequence of a shard set.

A row belongs to the sequence with its `document_id` and `start`. A row for the whole document, with a list as long as
the document or no lists at all, belongs to all sequences of the document.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import list_lengths
from weighted_mtp.scoring.imports.score_rows import ScoreRows
from weighted_mtp.scoring.imports.sources import quoted

MOST_START = 1 << 62
"""Largest start of a sequence in its document, for sums in int64."""


@dataclass(frozen=True)
class Matches:
    """The row of each sequence of the set, in order.

    Attributes:
        rows: row, or -1 if the sequence has none, int64 [sequences].
        offsets: index of the sequence's first token in the row's lists, int64 [sequences].
        lengths: tokens of each sequence, int64 [sequences].
        documents: `document_id` of each sequence.
    """

    rows: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    documents: pl.Series

    @property
    def missing(self) -> int:
        """Sequences without a row."""
        return int((self.rows < 0).sum())


def list_sequences(source: ShardSet) -> pl.DataFrame:
    """`document_id`, `start` and `length` in tokens of all sequences of a set.

    Raises:
        UserError: a shard is damaged, there is no sequence, two have the same id and start, or a start is impossible.
    """
    if not source.manifest.rows:
        raise UserError(f"{source.path}: has no sequences, so scores cannot be matched; choose another set")
    parts = []
    for shard in range(len(source.manifest.shards)):
        table = source.read(shard, ["document_id", "start", "input_ids"])
        lengths = list_lengths(table["input_ids"])
        parts.append(pl.DataFrame(pl.from_arrow(table.select(["document_id", "start"]))).with_columns(length=lengths))
    sequences = pl.concat(parts)
    twice = sequences.filter(sequences.select("document_id", "start").is_duplicated())
    if len(twice):
        raise UserError(
            f"{source.path}: has document {quoted(twice['document_id'][0])} twice, so scores cannot be matched; "
            "prepare the corpus with distinct ids"
        )
    impossible = sequences.filter(~pl.col("start").is_between(0, MOST_START))
    for document, start, _ in impossible.head(1).iter_rows():
        raise UserError(
            f"{source.path}: a sequence of document {quoted(document)} starts at token {start:,}, which is impossible; "
            "prepare the corpus again"
        )
    return sequences


def match_rows(source: ShardSet, rows: ScoreRows) -> Matches:
    """Find the row of each sequence.

    Raises:
        UserError: a row belongs to no sequence, its lists have the wrong length, or a sequence has two rows.
    """
    sequences = list_sequences(source).with_row_index("sequence")
    documents = sequences.group_by("document_id").agg(
        only=pl.when(pl.len() == 1).then(pl.first("start")), tokens=(pl.col("start") + pl.col("length")).max()
    )
    keyed = rows.keys.with_columns(length=row_lengths(rows)).with_row_index("index")
    keyed = keyed.join(documents, "document_id", "left", maintain_order="left")
    for row in keyed.filter(pl.col("tokens").is_null())["index"].head(1):
        raise UserError(f"{rows.describe(row)}: no such document in {source.path}; are the scores of this corpus?")
    listed = pl.col("length").is_not_null()
    spans = pl.col("start").fill_null(0) == 0
    keyed = keyed.with_columns(
        whole=pl.when(listed).then(spans & (pl.col("length") == pl.col("tokens"))).otherwise(pl.col("start").is_null()),
        at=pl.coalesce("start", "only"),
    )
    exact = match_sequences(source, rows, keyed.filter(~pl.col("whole")), sequences)
    spread = keyed.filter("whole").join(sequences, "document_id", "inner", suffix="_of_sequence")
    pairs = pl.concat(
        [
            exact.select("sequence", "index", offset=pl.lit(0, pl.Int64)),
            spread.select("sequence", "index", offset=pl.col("start_of_sequence")),
        ]
    ).sort("index")
    for row in pairs.filter(~pl.col("sequence").is_first_distinct())["index"].head(1):
        raise UserError(f"{rows.describe(row)}: an earlier row has scores of the same sequence; leave one out")
    found, offsets = np.full(len(sequences), -1), np.zeros(len(sequences), np.int64)
    found[pairs["sequence"].to_numpy()] = pairs["index"].to_numpy()
    offsets[pairs["sequence"].to_numpy()] = pairs["offset"].to_numpy()
    return Matches(found, offsets, sequences["length"].to_numpy(), sequences["document_id"])


def match_sequences(source: ShardSet, rows: ScoreRows, exact: pl.DataFrame, sequences: pl.DataFrame) -> pl.DataFrame:
    """Find the sequence of each row that belongs to one sequence.

    Args:
        source: the set, for messages.
        rows: all rows, for messages.
        exact: `index`, `document_id` and `length` of the rows, `at`, the start of the sequence or null if it is not
            given and the document has several, and `tokens` of the document.
        sequences: `sequence`, `document_id`, `start` and `length` of the sequences of the set.

    Returns:
        `exact` with the number of the `sequence`.

    Raises:
        UserError: there is no such sequence, or it has another length.
    """
    unknown = exact.filter(pl.col("at").is_null()).select("index", "tokens", "length")
    for row, tokens, length in unknown.head(1).iter_rows():
        raise UserError(
            f"{rows.describe(row)}: has a list of {length:,} for a document of {tokens:,} tokens in several sequences; "
            "give one list for each sequence, with its 'start', or one for the document"
        )
    sequence = sequences.rename({"length": "wanted", "start": "at"})
    exact = exact.join(sequence, ["document_id", "at"], "left", maintain_order="left")
    for row, at in exact.filter(pl.col("wanted").is_null()).select("index", "at").head(1).iter_rows():
        raise UserError(f"{rows.describe(row)}: no sequence of {source.path} starts at token {at:,}; correct 'start'")
    wrong = exact.filter(pl.col("length") != pl.col("wanted")).select("index", "length", "wanted")
    for row, length, wanted in wrong.head(1).iter_rows():
        raise UserError(
            f"{rows.describe(row)}: has a list of {length:,} for a sequence of {wanted:,} tokens; give one score for "
            "each token"
        )
    return exact


def row_lengths(rows: ScoreRows) -> pl.Series:
    """Length of the lists of each row, int64; null for a row without lists.

    Raises:
        UserError: two lists of a row differ in length.
    """
    longest = np.full(len(rows.keys), -1)
    for name, lists in rows.lists.items():
        differs = (lists.lengths >= 0) & (longest >= 0) & (lists.lengths != longest)
        for row in np.flatnonzero(differs)[:1].tolist():
            raise UserError(f"{rows.describe(row)}: '{name}' is not as long as the other lists; correct the row")
        longest = np.maximum(longest, lists.lengths)
    return pl.Series(longest).replace(-1, None)
