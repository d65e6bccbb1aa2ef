"""`wmtp weights`: shows the weights of a scheme on a scored corpus before training."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from weighted_mtp.pipelines.reports.pages import check_page, show
from weighted_mtp.pipelines.reports.tokens.marked_text import Excerpt
from weighted_mtp.pipelines.reports.weight_report import build_report
from weighted_mtp.pipelines.reports.weight_statistics import WeightStatistics, positions
from weighted_mtp.pipelines.reports.weight_totals import Totals
from weighted_mtp.schemas.configs import WeightsReportConfig, exact
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import Manifest
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.tokenizers import check_same_tokenizer, load_corpus_tokenizer
from weighted_mtp.schemas.weights.presets import PRESETS
from weighted_mtp.training.data.mixing import open_mix
from weighted_mtp.training.weighting import Weighting, make_weighting
from weighted_mtp.training.weighting.batch import BatchWeighting
from weighted_mtp.training.weighting.tables import scored_tokens

EXCERPT_TOKENS = 200


@dataclass(frozen=True)
class RowGroup:
    """A row group of a set: its shard number, and its number within that shard."""

    shard: int
    number: int


def run(config: WeightsReportConfig) -> None:
    """Print the report, and write it to `config.html` if set.

    Raises:
        UserError: a set or a column is unsuitable for the weights, or there are no targets.
    """
    check_page(config.html)
    shards = ZippedSets.open(config.set)
    mixed = open_mix(config.mix)
    for data in mixed:
        check_same_tokenizer(shards.first, data.first)
    weightings = [check_weighting(config, data) for data in (shards, *mixed)]
    manifest = shards.first.manifest
    groups = draw_groups(manifest, config.max_tokens, config.seed)
    statistics, excerpts = weigh_row_groups(shards, weightings[0], groups, config)
    mixture = weigh_mixture(config, statistics, mixed, weightings[1:]) if mixed else None
    tokenizer = load_corpus_tokenizer(shards.first)
    facts = describe(config, weightings[0], manifest, len(groups), statistics)
    show(build_report(facts, manifest, statistics, excerpts, tokenizer, mixture), config.html)


def check_weighting(config: WeightsReportConfig, shards: ZippedSets) -> Weighting:
    """The weighting of a set after the warm-up.

    Raises:
        UserError: the set is unsuitable for the weights, or has no targets.
    """
    manifest = shards.first.manifest
    if manifest.tokens == manifest.rows:
        raise UserError(f"{shards.first.path}: no sequence has two tokens, so it has no targets; prepare longer texts")
    weights = config.weights.model_copy(update={"warmup_ratio": 0.0})
    return make_weighting(weights, shards, config.live_column, ProgressBar)


def weigh_mixture(
    config: WeightsReportConfig, first: WeightStatistics, mixed: list[ZippedSets], weightings: list[Weighting]
) -> tuple[list[str], Totals]:
    """Names of the sets of a mixture, and their totals in proportion to their shares of the rows.

    Args:
        config: the settings.
        first: statistics of the first set, which gives the rest of the rows.
        mixed: the other sets.
        weightings: their weightings.
    """
    gathered = [first]
    for shards, weighting in zip(mixed, weightings, strict=True):
        groups = draw_groups(shards.first.manifest, config.max_tokens, config.seed)
        statistics, _ = weigh_row_groups(shards, weighting, groups, config.model_copy(update={"samples": 0}))
        gathered.append(statistics)
    shares = [float(1 - sum(map(exact, config.mix.values()))), *config.mix.values()]
    totals = [
        statistics.by_position.by(np.zeros(statistics.positions, dtype=np.int64), 1) * (share / statistics.tokens)
        for statistics, share in zip(gathered, shares, strict=True)
    ]  # per token of a training row
    names = [", ".join(map(str, config.set)), *config.mix]
    shown = [f"{share:.4g} of the rows: {name}" for name, share in zip(names, shares, strict=True)]
    return shown, Totals.concatenate(totals)


def describe(
    config: WeightsReportConfig, weighting: Weighting, manifest: Manifest, groups: int, statistics: WeightStatistics
) -> dict[str, str]:
    """Facts about scheme and sample, for the top of the report."""
    total = sum(shard.row_groups for shard in manifest.shards)
    drawn = f": {groups:,} of {total:,} row groups, drawn at random with seed {config.seed}" if groups < total else ""
    facts = {
        "set": "\n".join(map(str, config.set)),
        "formula": weighting.formula,
        "columns": ", ".join(weighting.columns) or "none",
    }
    if config.mix:
        facts["mixture"] = "only in the table by set; all other numbers are those of the set above"
    if config.weights.formula is None:
        facts["scheme"] = f"{config.weights.preset}: {PRESETS[config.weights.preset].source}"
    if config.live_column:
        facts["live loss"] = f"replaced by {config.live_column}"
    if weighting.waits:
        facts["batch"] = "each row group is treated as a batch"
    if config.weights.control != "none":
        facts["control"] = config.weights.control
    by_silent = config.weights.formula is None and "silent" in PRESETS[config.weights.preset].settings
    if statistics.silent and by_silent and not config.weights.silent:
        facts["weight 0"] = (
            "sequences without signal, such as documents no longer than the short context; "
            "--weights.silent 1 gives weight 1"
        )
    return facts | {"sample": f"{statistics.tokens:,} of {manifest.tokens:,} tokens{drawn}"}


def draw_groups(manifest: Manifest, max_tokens: int, seed: int) -> list[RowGroup]:
    """All row groups of a set, or a random sample of about `max_tokens` tokens, in order."""
    ends = np.cumsum([shard.row_groups for shard in manifest.shards], dtype=np.int64)
    total = int(ends[-1])
    wanted = max(1, round(total * max_tokens / manifest.tokens))
    if wanted < total:
        drawn = np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False, shuffle=False))
    else:
        drawn = np.arange(total)
    shards = np.searchsorted(ends, drawn, side="right")
    numbers = drawn - ends[shards] + [manifest.shards[shard].row_groups for shard in shards]
    return [RowGroup(*place) for place in zip(shards.tolist(), numbers.tolist(), strict=True)]


def weigh_row_groups(
    shards: ZippedSets, weighting: Weighting, groups: list[RowGroup], config: WeightsReportConfig
) -> tuple[WeightStatistics, list[Excerpt]]:
    """Compute weight statistics, treating each row group as a batch, and excerpts from some row groups."""
    label_columns = [name for name, kind in shards.sequence_columns.items() if kind == "label"]
    statistics = WeightStatistics(shards.first.manifest, label_columns)
    columns = list(dict.fromkeys([*weighting.columns, *statistics.by_label]))
    batch_weighting = BatchWeighting.make(config.weights, config.live_column)
    excerpts: list[Excerpt] = []
    rng = np.random.default_rng(config.seed)
    excerpt_counts = Counter(np.resize(rng.permutation(len(groups)), config.samples).tolist())
    for index, group in enumerate(ProgressBar(groups, unit="row groups", desc="weights", leave=False)):
        table = shards.read(group.shard, columns, group.number)
        ids, lengths = flat_values(table["input_ids"]), list_lengths(table["input_ids"])
        group_rng = np.random.default_rng([config.seed, group.shard, group.number])  # as in training
        weights = weighting.weigh(table, group_rng)
        if weighting.waits:
            weights = batch_weighting.weigh_tokens(weights, positions(lengths), group_rng)
        labels = {name: table[name] for name in statistics.by_label}
        statistics.add(ids, weights, scored_tokens(table, weighting.columns).mask, lengths, labels)
        if index in excerpt_counts:
            names = shards.first.read(group.shard, ["document_id", "start"], group.number)
            for row in draw_rows(lengths, excerpt_counts[index], rng):
                tokens = slice(int(lengths[:row].sum()), int(lengths[: row + 1].sum()))
                name, start = names["document_id"][row].as_py(), names["start"][row].as_py()
                excerpts.append(excerpt(name, start, ids[tokens], weights[tokens], rng))
    return statistics, excerpts


def draw_rows(lengths: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Sequences of at least two tokens, drawn without replacement in proportion to `lengths` (S,), in order."""
    weights = np.where(lengths > 1, lengths, 0)
    count = min(count, int(np.count_nonzero(weights)))
    drawn = rng.choice(len(lengths), count, replace=False, p=weights / weights.sum()) if count else np.arange(0)
    return sorted(map(int, drawn))


def excerpt(document_id: str, start: int, ids: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> Excerpt:
    """Up to `EXCERPT_TOKENS` consecutive tokens of a sequence (T,), from a random position."""
    first = int(rng.integers(max(1, len(ids) - EXCERPT_TOKENS + 1)))
    last = min(first + EXCERPT_TOKENS, len(ids))
    shown = weights[first:last].copy()
    if first == 0:
        shown[0] = np.nan
    return Excerpt(document_id, start + first, ids[first:last], shown, first == 0, last == len(ids))
