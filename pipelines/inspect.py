"""`wmtp inspect`: what a shard set holds, and which tokens score highest and lowest, in their text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weighted_mtp.pipelines.reports.pages import check_page, decode, printable, show
from weighted_mtp.schemas.configs import InspectConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import Contrast, Manifest, ScoreColumn
from weighted_mtp.schemas.shard_set.shard_set import SAMPLED_FOOTERS, ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.scoring.tokenizer import load_corpus_tokenizer

TOKENS_BEFORE = 24
TOKENS_AFTER = 8


@dataclass(frozen=True)
class ScoredToken:
    """One token with its score and what stands around it."""

    score: float
    document_id: str
    position: int
    before: list[int]
    token: int
    after: list[int]


def run(config: InspectConfig) -> None:
    """Print the report, and write it as HTML where asked."""
    check_page(config.html)
    shard_set = ShardSet.open(config.set)
    show(build_report(shard_set, config.column, config.samples), config.html)


def build_report(shard_set: ShardSet, column: str | None, samples: int) -> RenderableType:
    """Facts, columns, and sample tokens of a shard set.

    Raises:
        UserError: the set has no score column `column`, or one of its shards is damaged.
    """
    manifest = shard_set.manifest
    parts: list[RenderableType] = [facts_table(shard_set), columns_table(shard_set)]
    if column is not None:
        shard_set.require_column(column)
    column = column or default_column(manifest)
    if samples and manifest.rows:
        tokenizer = load_corpus_tokenizer(shard_set)
        if column is None:
            parts.append(sequences_table(shard_set, tokenizer, samples))
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
    """What the manifest says about the set as a whole."""
    manifest, corpus, tokenizer = shard_set.manifest, shard_set.manifest.corpus, shard_set.manifest.tokenizer
    size = sum(shard.bytes for shard in manifest.shards)
    added = [name for name, adds in (("BOS", corpus.adds_bos), ("EOS", corpus.adds_eos)) if adds]
    facts = {
        "corpus": f"{corpus.input} (field {corpus.text_field})",
        "documents": f"{corpus.documents:,}, and {corpus.rejects:,} rejected",
        "tokenizer": f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint[:12]})",
        "added": " and ".join(added) or "neither BOS nor EOS",
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
    """One row for each column that was asked for: what it is, what it costs and how its values are distributed."""
    manifest = shard_set.manifest
    table = Table(title="columns", title_justify="left")
    table.add_column("column")
    table.add_column("origin", overflow="fold")
    for name in ("B/token", "missing", "mean", "std", "1 %", "50 %", "99 %"):
        table.add_column(name, justify="right")
    about = "~" * (len(manifest.shards) > SAMPLED_FOOTERS)
    cost = {name: f"{about}{size:.2f}" for name, size in shard_set.bytes_per_token().items()}
    table.add_row("input_ids", "the corpus", cost["input_ids"])
    for name, kind in manifest.corpus.sequence_columns.items():
        table.add_row(name, f"the corpus, a {kind} for each document", cost[name])
    for name, column in manifest.columns.items():
        table.add_row(name, Text(column.origin.describe()), cost[name], *describe_statistics(column))
    return table


def describe_statistics(column: ScoreColumn) -> list[str]:
    """Missing, mean, standard deviation and three quantiles of a column."""
    statistics = column.statistics
    numbers = [statistics.mean, statistics.std, *(statistics.quantiles.get(q) for q in ("0.01", "0.5", "0.99"))]
    return [f"{statistics.missing:,}", *("-" if number is None else f"{number:.3f}" for number in numbers)]


def extremes(shard_set: ShardSet, column: str, count: int) -> tuple[list[ScoredToken], list[ScoredToken]]:
    """The `count` highest and the `count` lowest scoring tokens, the most extreme first; of equals the first.

    Row groups are read one after the other, so memory does not grow with the set. Tokens without a score never count.
    """
    highest: list[ScoredToken] = []
    lowest: list[ScoredToken] = []
    with ProgressBar(
        total=shard_set.manifest.tokens, unit="tok", unit_scale=True, desc=column, leave=False
    ) as progress:
        for index, shard in enumerate(shard_set.manifest.shards):
            for group in range(shard.row_groups):
                table = shard_set.read(index, ["document_id", "start", "input_ids", column], group)
                scores = flat_values(table[column]).astype(np.float32)
                scored = np.flatnonzero(np.isfinite(scores))
                ascending = scored[np.argsort(scores[scored], kind="stable")]
                descending = scored[np.argsort(-scores[scored], kind="stable")]
                lowest += [locate(table, column, int(entry)) for entry in ascending[:count]]
                highest += [locate(table, column, int(entry)) for entry in descending[:count]]
                lowest = sorted(lowest, key=lambda token: token.score)[:count]
                highest = sorted(highest, key=lambda token: -token.score)[:count]
                progress.update(len(scores))
    return highest, lowest


def locate(table: pa.Table, column: str, entry: int) -> ScoredToken:
    """The token at index `entry` of the concatenated lists of a row group."""
    ends = np.cumsum(list_lengths(table["input_ids"]))
    row = int(np.searchsorted(ends, entry, side="right"))
    ids = table["input_ids"][row].as_py()
    at = entry - (int(ends[row]) - len(ids))
    return ScoredToken(
        score=float(table[column][row][at].as_py()),
        document_id=table["document_id"][row].as_py(),
        position=table["start"][row].as_py() + at,
        before=ids[max(0, at - TOKENS_BEFORE) : at],
        token=ids[at],
        after=ids[at + 1 : at + 1 + TOKENS_AFTER],
    )


def extremes_table(title: str, tokens: list[ScoredToken], tokenizer: Any) -> Table:
    """One row for each token: score, place and the text around it with the token marked."""
    table = Table("score", "document", "token", "text, with »the token«", title=title, title_justify="left")
    for token in tokens:
        before, marked, after = split_text(tokenizer, token)
        text = Text.assemble(before, ("»" + marked + "«", "bold reverse"), after, overflow="fold")
        table.add_row(f"{token.score:.3f}", Text(token.document_id, overflow="fold"), str(token.position), text)
    if not tokens:
        table.caption = "no token has a score"
    return table


def sequences_table(shard_set: ShardSet, tokenizer: Any, samples: int) -> Table:
    """The beginnings of some sequences, spread evenly over the set."""
    carried = list(shard_set.manifest.corpus.sequence_columns)
    table = Table("document", *carried, "start", "tokens", "text", title="sequences", title_justify="left")
    ends = np.cumsum([shard.rows for shard in shard_set.manifest.shards])
    for row in np.unique(np.linspace(0, shard_set.manifest.rows - 1, samples).astype(int)):
        shard = int(np.searchsorted(ends, row, side="right"))
        held = shard_set.manifest.shards[shard].rows
        line = shard_set.read(shard).slice(int(row - (ends[shard] - held)), 1).to_pylist()[0]
        text = printable(decode(tokenizer, line["input_ids"][: TOKENS_BEFORE + TOKENS_AFTER]))
        values = [Text(f"{line[name]:g}" if isinstance(line[name], float) else line[name]) for name in carried]
        table.add_row(Text(line["document_id"]), *values, str(line["start"]), str(len(line["input_ids"])), Text(text))
    return table


def split_text(tokenizer: Any, token: ScoredToken) -> tuple[str, str, str]:
    """Text before the token, of the token and after it. Some tokenizers decode a token differently at the start."""
    before = decode(tokenizer, token.before)
    until = decode(tokenizer, [*token.before, token.token])
    whole = decode(tokenizer, [*token.before, token.token, *token.after])
    marked = until[len(before) :] if until.startswith(before) else decode(tokenizer, [token.token])
    after = whole[len(until) :] if whole.startswith(until) else decode(tokenizer, token.after)
    return printable(before), printable(marked), printable(after)
