"""The report of `wmtp inspect`: facts, columns and sample tokens of a shard set."""

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weighted_mtp.pipelines.reports.column_sizes import size_cells
from weighted_mtp.pipelines.reports.tokens.extreme_tokens import extremes, extremes_table
from weighted_mtp.pipelines.reports.tokens.token_text import decode
from weighted_mtp.schemas.shard_set.manifest import Contrast, Manifest
from weighted_mtp.schemas.shard_set.notebook import STATISTICS, statistics_cells
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.text import printable, shortened
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer

SEQUENCE_TOKENS = 32
"""Number of tokens to show per sequence."""


def build_report(shard_set: ShardSet, column: str | None, samples: int) -> RenderableType:
    """Facts, columns and sample tokens of a shard set.

    Raises:
        UserError: the set has no score column `column`, or a shard is damaged.
    """
    manifest = shard_set.manifest
    parts: list[RenderableType] = [facts_table(shard_set), columns_table(shard_set)]
    if column is not None:
        shard_set.require_column(column)
    column = column or default_column(manifest)
    if samples and manifest.rows:
        tokenizer = load_corpus_tokenizer(shard_set)
        if column is None:
            parts.append(sequences_table(shard_set, samples, tokenizer))
        else:
            highest, lowest = extremes(shard_set, column, samples)
            parts.append(extremes_table(f"highest {column}", highest, tokenizer))
            parts.append(extremes_table(f"lowest {column}", lowest, tokenizer))
    return Group(*parts)


def default_column(manifest: Manifest) -> str | None:
    """The first contrast, else the first column, else None."""
    contrasts = [name for name, column in manifest.columns.items() if isinstance(column.origin, Contrast)]
    return next(iter([*contrasts, *manifest.columns]), None)


def facts_table(shard_set: ShardSet) -> Table:
    """Facts about the whole set, from its manifest."""
    manifest, corpus, tokenizer = shard_set.manifest, shard_set.manifest.corpus, shard_set.manifest.tokenizer
    size = sum(shard.bytes for shard in manifest.shards)
    added = [name for name, adds in (("BOS", corpus.adds_bos), ("EOS", corpus.adds_eos)) if adds]
    facts = {
        "corpus": f"{corpus.input} (field {corpus.text_field})",
        "documents": f"{corpus.documents:,}, plus {corpus.rejects:,} rejected",
        "tokenizer": f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]})",
        "added": " and ".join(added) or "neither BOS nor EOS",
        "special tokens": "parsed" if corpus.special_tokens == "parse" else "ordinary text",
        "sequences": f"{manifest.rows:,} of at most {corpus.max_length:,} tokens",
        "tokens": f"{manifest.tokens:,}",
        "shards": f"{len(manifest.shards):,}",
        "bytes": f"{size:,}" + (f" ({size / manifest.tokens:.2f} per token)" if manifest.tokens else ""),
        "derived from": manifest.derived_from[:12] if manifest.derived_from else "a corpus",
        "digest": manifest.digest[:12],
        "written by": manifest.created_by,
    }
    table = Table(title=str(shard_set.path), show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def columns_table(shard_set: ShardSet) -> Table:
    """One row for each column: its origin, size and statistics."""
    manifest = shard_set.manifest
    table = Table(title="columns", title_justify="left")
    table.add_column("column")
    table.add_column("origin", overflow="fold")
    for name in ("B/token", "missing", *STATISTICS):
        table.add_column(name, justify="right")
    sizes = size_cells(shard_set)
    table.add_row("input_ids", "the corpus", sizes["input_ids"])
    for name, kind in manifest.corpus.sequence_columns.items():
        table.add_row(name, f"a {kind} for each document", sizes[name])
    for name, column in manifest.columns.items():
        cells = sizes[name], f"{column.statistics.missing:,}", *statistics_cells(column.statistics)
        table.add_row(name, Text(column.origin.describe()), *cells)
    return table


def sequences_table(shard_set: ShardSet, samples: int, tokenizer: Any) -> Table:
    """The beginnings of `samples` sequences, spread evenly over the set."""
    carried = list(shard_set.manifest.corpus.sequence_columns)
    table = Table("document", *carried, "start", "tokens", "text", title="sequences", title_justify="left")
    ends = np.cumsum([shard.rows for shard in shard_set.manifest.shards])
    for row in np.unique(np.linspace(0, shard_set.manifest.rows - 1, samples).astype(int)):
        shard = int(np.searchsorted(ends, row, side="right"))
        held = shard_set.manifest.shards[shard].rows
        line = shard_set.read(shard).slice(int(row - (ends[shard] - held)), 1).to_pylist()[0]
        text = printable(decode(tokenizer, line["input_ids"][:SEQUENCE_TOKENS]))
        values = [f"{line[name]:g}" if isinstance(line[name], float) else line[name] for name in carried]
        texts = [Text(shortened(value)) for value in (line["document_id"], *values)]
        table.add_row(*texts, str(line["start"]), str(len(line["input_ids"])), Text(text))
    return table
