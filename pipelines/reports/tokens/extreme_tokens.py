"""The tokens with the highest and lowest scores of a column, shown in context."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from weighted_mtp.pipelines.reports.tokens.token_text import decode
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.notebook import score_text
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.text import printable, shortened

TOKENS_BEFORE = 24
TOKENS_AFTER = 8


@dataclass(frozen=True)
class ScoredToken:
    """One token with its score and the token ids around it."""

    score: float
    document_id: str
    position: int
    before: list[int]
    token: int
    after: list[int]


def extremes(shard_set: ShardSet, column: str, count: int) -> tuple[list[ScoredToken], list[ScoredToken]]:
    """The `count` highest and `count` lowest scoring tokens, most extreme first; ties go to the first token.

    Reads one row group at a time, to keep memory constant. Skips tokens without a score.
    """
    highest: list[ScoredToken] = []
    lowest: list[ScoredToken] = []
    total = shard_set.manifest.tokens
    with ProgressBar(total=total, unit="tokens", unit_scale=True, desc=column, leave=False) as progress:
        for shard, group in shard_set.manifest.row_groups():
            table = shard_set.read(shard, ["document_id", "start", "input_ids", column], group)
            scores = flat_values(table[column])
            scored = np.flatnonzero(np.isfinite(scores))
            ascending = scored[np.argsort(scores[scored], kind="stable")]
            descending = scored[np.argsort(-scores[scored], kind="stable")]
            lowest += [token_at(table, column, int(index)) for index in ascending[:count]]
            highest += [token_at(table, column, int(index)) for index in descending[:count]]
            lowest = sorted(lowest, key=lambda token: token.score)[:count]
            highest = sorted(highest, key=lambda token: -token.score)[:count]
            progress.update(len(scores))
    return highest, lowest


def token_at(table: pa.Table, column: str, index: int) -> ScoredToken:
    """Token `index` of the concatenated lists of a row group."""
    ends = np.cumsum(list_lengths(table["input_ids"]))
    row = int(np.searchsorted(ends, index, side="right"))
    ids = table["input_ids"][row].as_py()
    at = index - (int(ends[row]) - len(ids))
    return ScoredToken(
        score=float(table[column][row][at].as_py()),
        document_id=table["document_id"][row].as_py(),
        position=table["start"][row].as_py() + at,
        before=ids[max(0, at - TOKENS_BEFORE) : at],
        token=ids[at],
        after=ids[at + 1 : at + 1 + TOKENS_AFTER],
    )


def extremes_table(title: str, tokens: list[ScoredToken], tokenizer: Any) -> Table:
    """One row for each token: its score, its position, and its text with the token marked."""
    table = Table("score", "document", "token", "text, with »the token«", title=title, title_justify="left")
    for token in tokens:
        before, marked, after = split_text(tokenizer, token)
        text = Text.assemble(before, ("»" + marked + "«", "bold reverse"), after, overflow="fold")
        table.add_row(
            score_text(token.score), Text(shortened(token.document_id), overflow="fold"), str(token.position), text
        )
    if not tokens:
        table.caption = "no token has a score"
    return table


def split_text(tokenizer: Any, token: ScoredToken) -> tuple[str, str, str]:
    """Text before the token, the token's text, and text after it.

    Decodes the ids together: some tokenizers decode the first token of a text differently.
    """
    before = decode(tokenizer, token.before)
    until = decode(tokenizer, [*token.before, token.token])
    whole = decode(tokenizer, [*token.before, token.token, *token.after])
    marked = until[len(before) :] if until.startswith(before) else decode(tokenizer, [token.token])
    after = whole[len(until) :] if whole.startswith(until) else decode(tokenizer, token.after)
    return printable(before), printable(marked), printable(after)
