"""Importing as functions: a shard set and scores to a shard set with more columns.

The same call continues a stopped run and leaves a finished one unchanged.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weighted_mtp.schemas.configs import ImportConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Imported, ImportedFile, ImportedValues, Origin, find_clash
from weighted_mtp.schemas.shard_set.shard_set import ShardSet, find_finished
from weighted_mtp.schemas.storage.claims import check_separate, claim_output
from weighted_mtp.schemas.storage.files import TOKENIZER, copy_files, sha256_file
from weighted_mtp.schemas.storage.locations import Location, locate, remove_tree
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.scoring.imports.in_memory import open_rows
from weighted_mtp.scoring.imports.matching import match_rows
from weighted_mtp.scoring.imports.new_columns import NewColumns
from weighted_mtp.scoring.imports.score_files import find_score_files, open_score_file
from weighted_mtp.scoring.imports.score_rows import read_rows
from weighted_mtp.scoring.imports.sources import Kind, ScoreSource, choose_columns
from weighted_mtp.scoring.job.finish import earlier_rejects, finish
from weighted_mtp.scoring.job.units import ScoredShard, clear_attempts, commit, find_done, new_attempt, write_unit


@dataclass(frozen=True)
class ImportProgress:
    """State of an import: tokens in finished shards, and sequences of the set without a row of scores."""

    tokens: int
    missing: int


Report = Callable[[ImportProgress], None]


def import_scores(config: ImportConfig, report: Report = lambda progress: None) -> ShardSet:
    """Add the columns of score files to a shard set.

    Args:
        config: the settings of `wmtp import`.
        report: receives the progress at the start and after each shard; nothing if the output is already complete.

    Raises:
        UserError: the input, the score files or the output are unsuitable.
        OSError: a file cannot be read or written.
    """
    source = open_source(config.input, config.output)
    files = [open_score_file(path) for path in find_score_files(config.scores)]
    kinds = choose_new(files, config.columns, source)
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
        columns = read_columns(source, files, kinds)
        origins = {name: Imported(files=digests, column=name) for name in columns.score_columns}
        return write_set(columns, config.output, origins, request, report)


def add_columns(
    input: ShardSet | Location | str,
    output: Location | str,
    rows: Any,
    columns: Sequence[str] | str = (),
    *,
    report: Report = lambda progress: None,
) -> ShardSet:
    """Add columns of rows in memory to a shard set: scores of tokens, and numbers and labels of documents.

    A row has a `document_id`, optionally a `start`, and a value for each column: a list of T numbers for a sequence or
    a document of T tokens, or one number or string. None and NaN mean that a score is missing, and so does a missing
    row. The rows are read once, before anything is written, also if the output is complete. Scores are held as float16.

    Args:
        input: shard set, whose columns are kept.
        output: directory of the new set. The same call with equal values continues a stopped one, and returns a
            finished set.
        rows: a table with `__arrow_c_stream__` (pyarrow, polars, pandas, DuckDB), or an iterable of mappings from names
            to values, for instance a generator over `ShardSet.sequences`. Lists may be NumPy arrays or torch tensors.
        columns: columns to add; none means all.
        report: receives the progress at the start and after each shard; nothing if the output is already complete.

    Returns:
        The set in `output`.

    Raises:
        UserError: the input, the rows or the output are unsuitable. `rows[n]` in the message counts from 0.
        OSError: a file cannot be read or written.
    """
    output = locate(output)
    source = open_source(input, output)
    wanted = [columns] if isinstance(columns, str) else columns
    if not (isinstance(wanted, Sequence) and all(isinstance(name, str) for name in wanted)):
        raise UserError("columns: should be a list of names")
    opened = open_rows(rows, wanted)
    added = read_columns(source, [opened], choose_new([opened], wanted, source))
    digests = added.digests()
    request = json.dumps(
        {"command": "import", "input": source.manifest.digest, "values": digests, "columns": dict(added.kinds)}
    )
    with exclusive(output):
        if finished := find_finished(output, request):
            return finished
        origins = {name: ImportedValues(values_sha256=digests[name]) for name in added.score_columns}
        return write_set(added, output, origins, request, report)


def open_source(source: ShardSet | Location | str, output: Location) -> ShardSet:
    """Open the set to add columns to, and check that an import can finish.

    Raises:
        UserError: it is damaged, or it is the output.
    """
    opened = source if isinstance(source, ShardSet) else ShardSet.open(source)
    check_separate(output, opened.path)
    opened.value_counts(), earlier_rejects(opened)  # both are needed at the end: fail now if they are damaged
    return opened


def choose_new(sources: Sequence[ScoreSource], wanted: Sequence[str], source: ShardSet) -> dict[str, Kind]:
    """The columns to import and their kinds.

    Raises:
        UserError: a column cannot be used, or the set already has it.
    """
    kinds = choose_columns(sources, wanted)
    held = {*source.manifest.columns, *source.manifest.corpus.sequence_columns}
    for name in kinds:
        if name in held:
            raise UserError(f"{source.path}: already has a column '{name}'; rename yours, or choose other columns")
    if clash := find_clash([*source.manifest.columns, *source.manifest.corpus.sequence_columns, *kinds]):
        raise UserError(f"{source.path}: {clash}; rename yours, or choose other columns")
    return kinds


def read_columns(source: ShardSet, sources: Sequence[ScoreSource], kinds: Mapping[str, Kind]) -> NewColumns:
    """Read all rows, and find and check the values of each sequence of the set.

    Raises:
        UserError: a row cannot be read or belongs to no sequence, or a document lacks a value.
    """
    rows = read_rows(sources, kinds, source.manifest.tokens)
    columns = NewColumns(source, kinds, rows, match_rows(source, rows))
    columns.check_documents()
    return columns


def write_set(
    columns: NewColumns, output: Location, origins: Mapping[str, Origin], request: str, report: Report
) -> ShardSet:
    """Write the set with the columns into the locked directory `output`.

    Raises:
        UserError: the output holds something else, or a shard is damaged.
    """
    source = columns.source
    if not claim_output(output, request):
        remove_tree(output / TOKENIZER)  # left by an earlier claim without finished work
    clear_attempts(output)
    copy_files(source.tokenizer_path, output / TOKENIZER)
    write_shards(columns, output, report)
    return finish(output, source, origins, request, columns.sequence_columns)


def write_shards(columns: NewColumns, output: Location, report: Report) -> None:
    """Write the shards with the columns that are not yet done into the claimed directory `output`.

    Raises:
        UserError: a shard is damaged.
    """
    source = columns.source
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
            write_unit(output, attempt, scored, columns.score_columns, read - started)
            commit(output, attempt)
        first += entry.rows
        progress = replace(progress, tokens=progress.tokens + entry.tokens)
        report(progress)
