"""The report of `wmtp weights`: tables, a histogram, and texts with weights."""

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from weighted_mtp.pipelines.reports.label_totals import LabelTotals
from weighted_mtp.pipelines.reports.tokens.marked_text import LEGEND, Excerpt, marked
from weighted_mtp.pipelines.reports.tokens.token_classes import CLASSES, classify, token_texts
from weighted_mtp.pipelines.reports.weight_statistics import WeightStatistics, position_names
from weighted_mtp.pipelines.reports.weight_totals import Totals
from weighted_mtp.schemas.shard_set.manifest import Manifest
from weighted_mtp.schemas.text import printable, shortened

QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
BAR = 40
"""Width of the longest bar, in characters."""
LONGEST_LABEL = 60
"""Most characters of a label shown."""
SHOWN_IDS = 12
MIN_COUNT = 20
MIN_SHARE = 1e-5
"""Minimum number and minimum share of targets of an id in the tables."""
NEARLY_ALL = 0.99
FEW_KEPT = 0.1
LOW_EFFECTIVE_SHARE = 0.01


def build_report(
    facts: dict[str, str],
    manifest: Manifest,
    statistics: WeightStatistics,
    excerpts: list[Excerpt],
    tokenizer: Any,
    mixture: tuple[list[str], Totals] | None,
) -> RenderableType:
    """The whole report.

    Args:
        facts: names and values to show first.
        manifest: manifest of the set.
        statistics: statistics of the weights.
        excerpts: texts to show with their weights.
        tokenizer: tokenizer of the set.
        mixture: names of the sets of a mixture, and their totals in proportion to their shares of the training rows.
    """
    sections: list[RenderableType] = [
        facts_table(facts | summary(statistics)),
        quantiles_table(statistics),
        histogram_table(statistics),
        totals_table("position in the sequence", position_names(manifest.longest), statistics.by_position),
        *(label_table(name, totals) for name, totals in statistics.by_label.items()),
        classes_table(statistics, tokenizer),
        ids_tables(statistics, tokenizer),
    ]
    if mixture:
        sections.insert(1, totals_table("set of the mixture", *mixture))
    if excerpts:
        sections.append(Text("\ntexts with their weights", style="italic"))
        sections.append(Text(LEGEND, style="dim"))
    for excerpt in excerpts:
        last = excerpt.position + len(excerpt.ids) - 1
        sections.append(
            Text(f"\n{shortened(excerpt.document_id)}, tokens {excerpt.position:,} to {last:,}", style="bold")
        )
        sections.append(Padding(marked(excerpt, tokenizer, statistics.typical), (0, 2)))
    return Group(*sections)


def summary(statistics: WeightStatistics) -> dict[str, str]:
    """Summary statistics of the weights, and notes on likely problems."""
    targets, kept = statistics.targets, statistics.kept
    facts = {
        "targets": f"{targets:,} of {statistics.tokens:,} tokens; the first of a sequence is not a target",
        "scored": f"{statistics.scored / targets:.2%} of the targets",
        "kept": f"{kept / targets:.2%} of the targets have weight",
        "mean weight": f"{statistics.mean:.4f} over all targets; absolute, over kept targets, {statistics.typical:.4f}",
        "effective sample": f"{statistics.effective_share:.2%} of the targets, (sum |w|)² / sum w²",
        "silent sequences": f"{statistics.silent:,} of {statistics.sequences:,} have no weight at all",
    }
    notes = []
    if kept < FEW_KEPT * targets:
        notes.append(
            f"{1 - kept / targets:.1%} of the targets have weight 0 and do not train the model; a scheme that keeps "
            "more targets, or a smaller and better corpus, would waste less compute"
        )
    if kept and statistics.effective_share < LOW_EFFECTIVE_SHARE:
        notes.append(
            "a few weights outweigh all others and will dominate training; limit them, for instance with clip()"
        )
    return facts | ({"note": "\n".join(notes)} if notes else {})


def facts_table(facts: dict[str, str]) -> Table:
    """Names and values."""
    table = Table(title="weights", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, Text(value, style="bold" if name == "note" else ""))
    return table


def quantiles_table(statistics: WeightStatistics) -> Table:
    """Quantiles of the weights of all targets."""
    table = Table(title="quantiles of the weights of all targets", title_justify="left")
    for share in QUANTILES:
        table.add_column(f"{share:.4g}" if share in (0, 1) else f"{100 * share:g} %", justify="right")
    table.columns[0].header, table.columns[-1].header = "least", "largest"
    table.add_row(*(f"{value:.4g}" for value in statistics.quantiles(QUANTILES)))
    return table


def histogram_table(statistics: WeightStatistics) -> Table:
    """Histogram of the weights of all targets."""
    table = Table("weight", "targets", "", title="distribution of the weights", title_justify="left")
    table.columns[1].justify = "right"
    lines = statistics.histogram()
    most = max(count for _, count in lines)
    for name, count in lines:
        table.add_row(name, f"{count / statistics.targets:.2%}", bar(count / most))
    return table


def bar(share: float) -> str:
    """A bar of this share of the full width, at least one mark for a share above 0."""
    return "█" * max(round(BAR * share), int(share > 0))


def totals_table(title: str, names: list[str], totals: Totals) -> Table:
    """One row for each nonempty group. The bars show mean absolute weights."""
    title = printable(title)
    table = Table(title, title=f"weights by {title}", title_justify="left")
    for column in ("of the targets", "kept", "mean weight", "of all weight"):
        table.add_column(column, justify="right")
    table.add_column()
    weight = float(totals.magnitude.sum()) or 1.0
    means = totals.mean_magnitude
    largest = float(np.nanmax(means)) or 1.0
    for group in np.flatnonzero(totals.targets):
        table.add_row(
            printable(names[group]),
            f"{totals.targets[group] / totals.targets.sum():.2%}",
            f"{totals.kept_share[group]:.1%}",
            f"{totals.mean[group]:.4f}",
            f"{totals.magnitude[group] / weight:.2%}",
            bar(means[group] / largest),
        )
    return table


def label_table(column: str, totals: LabelTotals) -> Table:
    """The weights of the most frequent values of a label column."""
    names, values = totals.most_frequent()
    return totals_table(column, [shortened(name, LONGEST_LABEL) for name in names], values)


def classes_table(statistics: WeightStatistics, tokenizer: Any) -> Table:
    """The weights of each class of tokens."""
    totals = statistics.by_id
    occur = np.flatnonzero(totals.targets)
    classes = np.zeros(len(totals.targets), dtype=np.int64)
    classes[occur] = classify(tokenizer, occur)
    return totals_table("class of token", list(CLASSES), totals.by(classes, len(CLASSES)))


def ids_tables(statistics: WeightStatistics, tokenizer: Any) -> Table:
    """The token ids with the largest and smallest kept share, side by side.

    If nearly all tokens are kept, shows the ids with the largest and smallest mean weight.
    """
    totals = statistics.by_id
    selects = statistics.kept < NEARLY_ALL * statistics.scored
    min_count = max(MIN_COUNT, int(np.ceil(MIN_SHARE * statistics.targets)))
    both = Table.grid(padding=(0, 4))
    both.title, both.title_justify = f"token ids with at least {min_count:,} targets", "left"
    titles = ("kept most often", "kept least often") if selects else ("most weight", "least weight")
    pairs = zip(titles, ranked_ids(totals, min_count, selects), strict=True)
    both.add_row(*(ids_table(title, ids, totals, tokenizer) for title, ids in pairs))
    return both


def ranked_ids(totals: Totals, min_count: int, by_kept: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ids with the largest and smallest kept share, at most `SHOWN_IDS` each.

    Ranks only ids with at least `min_count` targets. Mean weight, then frequency, breaks ties. Without `by_kept`, ranks
    only by these two.
    """
    ids = np.flatnonzero(totals.targets >= min_count)
    kept, mean, count = totals.kept_share[ids] * by_kept, totals.mean[ids], totals.targets[ids]
    most = ids[np.lexsort((-count, -mean, -kept))]
    least = ids[np.lexsort((-count, mean, kept))]
    shown = min(SHOWN_IDS, len(ids) // 2)
    return most[:shown], least[~np.isin(least, most[:shown])][:shown]


def ids_table(title: str, ids: np.ndarray, totals: Totals, tokenizer: Any) -> Table:
    """One row for each of the ids."""
    table = Table("»token«", title=title, title_justify="left")
    for column in ("id", "targets", "kept", "mean weight"):
        table.add_column(column, justify="right")
    for index, text in zip(ids.tolist(), token_texts(tokenizer, ids), strict=True):
        numbers = f"{totals.targets[index]:,}", f"{totals.kept_share[index]:.1%}", f"{totals.mean[index]:.4f}"
        table.add_row(Text(f"»{printable(text)}«"), str(index), *numbers)
    return table
