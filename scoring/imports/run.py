"""Importing as a function: a shard set and score files to a shard set with more columns.

The same call continues a stopped run and leaves a finished one unchanged.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa

from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Imported, ImportedFile, SequenceKind
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, find_finished
from weighted_mtp.schemas.shard_set.shards import list_column, list_lengths
from weighted_mtp.schemas.storage.claims import claim_output
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files, sha256_file
from weighted_mtp.schemas.storage.locations import Location, remove_tree, resolve
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.scoring.imports.matching import Matches, match_rows
from weighted_mtp.scoring.imports.score_files import (
    Kind,
    Lists,
    ScoreRows,
    choose_columns,
    find_score_files,
    read_scores,
    read_types,
)
from weighted_mtp.scoring.job.finish import earlier_rejects, finish
from weighted_mtp.scoring.job.units import ScoredShard, clear_attempts, commit, find_done, new_attempt, write_unit


@dataclass(frozen=True)
class ImportProgress:
    """State of an import: tokens in finished shards, and sequences of the set without a row in the files."""

    tokens: int
    missing: int


def import_scores(config: ImportConfig, report: Callable[[ImportProgress], None] = lambda progress: None) -> ShardSet:
    """Add the columns of score files to a shard set.

    Args:
        config: the settings of `wmtp import`.
        report: receives the progress at the start and after each shard; nothing if the output is already complete.

    Raises:
        UserError: the input, the score files or the output are unsuitable.
        OSError: a file cannot be read or written.
    """
    if resolve(config.input) == resolve(config.output):
        raise UserError(
            f"--output {config.output}: is also the --input; choose another, which will hold its columns, too"
        )
    source = ShardSet.open(config.input)
    source.value_counts(), earlier_rejects(source)  # both are needed at the end: fail now if they are damaged
    files = [read_types(path) for path in find_score_files(config.scores)]
    kinds = choose_columns(files, config.columns)
    check_new(kinds, source)
    digests = tuple(ImportedFile(name=file.path.name, sha256=sha256_file(file.path)) for file in files)
    request = json.dumps(
        {
            "command": "import",
            "input": source.manifest.digest,
            "files": sorted(file.sha256 for file in digests),
            "columns": dict(kinds),
        }
    )
    with exclusive(config.output):
        if finished := find_finished(config.output, request):
            return finished
        rows = read_scores(files, kinds, source.manifest.tokens)
        columns = NewColumns(kinds, rows, match_rows(source, rows))
        columns.check_documents(source)
        if not claim_output(config.output, request):
            remove_tree(config.output / TOKENIZER)  # left by an earlier claim without finished work
        clear_attempts(config.output)
        copy_files(source.tokenizer_path, config.output / TOKENIZER)
        add_columns(source, config.output, columns, report)
        origins = {name: Imported(files=digests, column=name) for name in rows.lists}
        return finish(config.output, source, origins, request, columns.sequence_columns)


def check_new(names: Mapping[str, Kind], source: ShardSet) -> None:
    """Raise UserError if the set already has one of these columns."""
    held = {*source.manifest.columns, *source.manifest.corpus.sequence_columns}
    if taken := [name for name in names if name in held]:
        raise UserError(
            f"--input {source.path}: already has a column '{taken[0]}'; rename it in the score files, "
            "or omit it in --columns"
        )


@dataclass(frozen=True)
class NewColumns:
    """The columns of score files, and the row of each sequence of a set."""

    kinds: Mapping[str, Kind]
    rows: ScoreRows
    matches: Matches

    @property
    def sequence_columns(self) -> dict[str, SequenceKind]:
        """Kinds of the columns with one value for each sequence."""
        return {name: kind for name, kind in self.kinds.items() if kind != "score"}

    def check_documents(self, source: ShardSet) -> None:
        """Check the columns with one value for each document.

        Raises:
            UserError: a document has no value, or different ones.
        """
        if not self.sequence_columns:
            return
        for name in self.sequence_columns:
            values = self.rows.numbers[name] if name in self.rows.numbers else self.rows.labels[name]
            series = pl.Series(values)
            value = series.fill_nan(None) if series.dtype.is_float() else series
            found = value.gather(pl.Series(self.matches.rows).replace(-1, None))
            documents = pl.DataFrame({"document": self.matches.documents, "value": found})
            if missing := documents.filter(found.is_null())["document"].unique(maintain_order=True).to_list():
                raise UserError(
                    f"{self.rows.files[0]}: '{name}' has no value for {len(missing):,} documents of {source.path} "
                    f"(first: {missing[0]!r:.80}); every document needs one"
                )
            differ = documents.group_by("document", maintain_order=True).agg(pl.col("value").n_unique())
            for document in differ.filter(pl.col("value") > 1)["document"].head(1):
                raise UserError(
                    f"{self.rows.files[0]}: '{name}' differs between rows of document {document!r:.80}; "
                    "give one value for each document"
                )

    def append(self, table: pa.Table, first: int) -> pa.Table:
        """Append the columns to a shard whose first sequence is number `first` of the set."""
        end = first + table.num_rows
        rows, offsets = self.matches.rows[first:end], self.matches.offsets[first:end]
        lengths = list_lengths(table["input_ids"])
        at = 1 + sum(
            not pa.types.is_list(field.type) for field in table.schema
        )  # before them, only input_ids is a list
        for name, kind in self.kinds.items():
            if kind == "score":
                scores = gather(self.rows.lists[name], rows, offsets, lengths)
                table = table.append_column(name, list_column(scores, lengths))
            else:
                values = (
                    pa.array(self.rows.numbers[name][rows])
                    if kind == "number"
                    else self.rows.labels[name].take(pa.array(rows))
                )
                table = table.add_column(at, name, values)
                at += 1
        return table


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


def add_columns(
    source: ShardSet, output: Location, columns: NewColumns, report: Callable[[ImportProgress], None]
) -> None:
    """Write the shards of a set, with more columns, that are not yet done into the claimed directory `output`.

    Raises:
        UserError: a shard is damaged.
    """
    done = find_done(output, source.manifest.shards)
    progress = ImportProgress(0, columns.matches.missing)
    report(progress)
    first = 0
    for number, entry in enumerate(source.manifest.shards):
        if entry.name not in done:
            started = time.monotonic()
            table = source.file(number).read_hashed()
            read = time.monotonic()
            table = columns.append(table, first)
            scored = ScoredShard(table, rejects=[], score_seconds=time.monotonic() - read)
            attempt = new_attempt(entry.name)
            write_unit(output, attempt, scored, tuple(columns.rows.lists), read - started)
            commit(output, attempt)
        first += entry.rows
        progress = replace(progress, tokens=progress.tokens + entry.tokens)
        report(progress)
