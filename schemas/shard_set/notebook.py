"""A shard set in one line, and as an HTML table for notebooks."""

from html import escape

from weighted_mtp.schemas.shard_set.manifest import Manifest
from weighted_mtp.schemas.shard_set.value_counts import ColumnStatistics
from weighted_mtp.schemas.storage.locations import Location

STATISTICS = ("mean", "std", "1 %", "50 %", "99 %")
"""Headings of `statistics_cells`."""
SMALLEST_DECIMAL = 0.0005
"""Smallest number that does not round to 0.000."""


def statistics_cells(statistics: ColumnStatistics) -> list[str]:
    """Mean, standard deviation and quantiles of a column, as in `STATISTICS`; `-` without any score."""
    numbers = [statistics.mean, statistics.std, *(statistics.quantiles.get(share) for share in ("0.01", "0.5", "0.99"))]
    return ["-" if number is None else score_text(number) for number in numbers]


def score_text(number: float) -> str:
    """A score with three decimals, or three significant digits if the decimals would all be 0."""
    return f"{number:.3f}" if number == 0 or abs(number) >= SMALLEST_DECIMAL else f"{number:.3g}"


def describe_line(path: Location, manifest: Manifest) -> str:
    """Path, size and columns of a set in one line."""
    columns = ", ".join([*manifest.corpus.sequence_columns, *manifest.columns]) or "none"
    return f"ShardSet('{path}', {manifest.tokens:,} tokens in {manifest.rows:,} sequences, columns: {columns})"


def describe_html(path: Location, manifest: Manifest) -> str:
    """Path and size of a set, and a table of its columns with origins and statistics, as HTML."""
    rows = [html_row("th", "column", "origin", "missing", *STATISTICS)]
    for name, kind in manifest.corpus.sequence_columns.items():
        rows.append(html_row("td", name, f"a {kind} for each document"))
    for name, column in manifest.columns.items():
        cells = f"{column.statistics.missing:,}", *statistics_cells(column.statistics)
        rows.append(html_row("td", name, column.origin.describe(), *cells))
    size = f"{manifest.tokens:,} tokens in {manifest.rows:,} sequences of {manifest.corpus.documents:,} documents"
    return f"<p><b>{escape(str(path))}</b><br>{size}</p>\n<table>\n{''.join(rows)}</table>"


def html_row(tag: str, *cells: str) -> str:
    """A row of a table; `tag` is `th` or `td`."""
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>\n"
