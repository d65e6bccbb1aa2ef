"""Scoring one shard: read it, let the engines compute token losses, write it with its score columns."""

from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError, first_line
from schemas.files import PROGRESS, atomic_write
from schemas.locations import Location
from schemas.manifest import SHARD_ENTRY, ShardEntry, Window
from schemas.shards import flat_values, list_column, list_lengths, read_shard, write_shard
from schemas.value_counts import ValueCounts, from_table, to_table
from scoring.conditions import Measurement, ScoringPlan
from scoring.engines import Engine, EngineConfig, Request, load_engine
from scoring.windows import plan_windows, window_ids

ENTRY_KEY = b"entry"
CONTRAST_STEP = np.float32(2.0**-9)
ROUNDING = 0.01
"""Losses and entropies are not negative, but computed ones may be, by a little."""
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ScoringTask:
    """What a worker needs to know to score any shard of a set; both paths are absolute."""

    source: Location
    output: Location
    plan: ScoringPlan
    engine: EngineConfig
    bos_token_id: int | None


class ShardScorer:
    """Scores shards with the engines of one worker, each model loaded once."""

    def __init__(self, task: ScoringTask) -> None:
        """Load the engines.

        Raises:
            UserError: an engine cannot load its model.
        """
        self.task = task
        self.engines: dict[str, Engine] = {}
        for model in task.plan.models:
            try:
                self.engines[model.fingerprint] = load_engine(model.directory, task.engine)
            except UserError:
                raise
            except Exception as error:  # whatever the engine has to say
                reason = shorten(f"{type(error).__name__}: {first_line(error)}", 400)
                remedy = "try --engine transformers" if task.engine.name == "vllm" else "check the checkpoint"
                if task.engine.engine_args:
                    remedy = f"check --engine_args, or {remedy}"
                raise UserError(f"{model.name}: {task.engine.name} cannot load it ({reason}); {remedy}") from error

    def score(self, shard: ShardEntry) -> None:
        """Write the scored shard under the name of its source, then its part record.

        The record is what makes a shard count as done, and it comes last: a run that is killed at any moment leaves
        nothing that a rerun would trust wrongly.

        Raises:
            UserError: a damaged source shard, or a model that gives a token no finite loss.
        """
        table = self._score_rows(read_shard(self.task.source / shard.name))
        entry = write_shard(self.task.output / shard.name, table)
        counts = {name: ValueCounts() for name in self.task.plan.columns}
        for name, column_counts in counts.items():
            column_counts.add(flat_values(table[name]))
        write_part(self.task.output, entry, counts)

    def _score_rows(self, table: pa.Table) -> pa.Table:
        """Append the score columns to the rows of a shard."""
        lengths = list_lengths(table["input_ids"])
        sequences = np.split(flat_values(table["input_ids"]), np.cumsum(lengths)[:-1])
        scores = self._measure(sequences, table)
        for name, values in scores.items():
            model = self.task.plan.measurements[name].model.name
            check_scores(values, lengths, model, table["document_id"])
        for name, contrast in self.task.plan.contrasts.items():
            minuend, subtrahend = (
                scores[side] if side in scores else stored_scores(table, side)
                for side in (contrast.minuend, contrast.subtrahend)
            )
            scores[name] = round_contrast(minuend - subtrahend)
        for name in self.task.plan.columns:
            table = table.append_column(name, list_column(scores[name].astype(np.float16), lengths))
        return table

    def _measure(self, sequences: list[np.ndarray], table: pa.Table) -> dict[str, np.ndarray]:
        """Every measured column, float32, the sequences one after the other. One engine call for each model."""
        plan = self.task.plan
        scores: dict[str, np.ndarray] = {}
        for fingerprint, engine in self.engines.items():
            of_model = {
                name: measurement
                for name, measurement in plan.measurements.items()
                if measurement.model.fingerprint == fingerprint
            }
            # Short contexts leave the first tokens their full context: where that is stored, it is not computed again.
            full = (name for name, of in plan.stored.items() if of == Measurement(of.model))
            known = (stored_scores(table, name) for name in full if plan.stored[name].model.fingerprint == fingerprint)
            scores |= measure(engine, sequences, of_model, self.task.bos_token_id, next(known, None))
        return {name: scores[name] for name in plan.measurements}


def stored_scores(table: pa.Table, column: str) -> np.ndarray:
    """A score column of a shard, float32, the sequences one after the other."""
    return flat_values(table[column]).astype(np.float32)


def measure(
    engine: Engine,
    sequences: list[np.ndarray],
    measurements: dict[str, Measurement],
    bos_token_id: int | None,
    known_losses: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """All measurements of one model.

    Full sequences and windows go to the engine together, so that it can fill its batches.

    Args:
        engine: the model.
        sequences: token ids, int32.
        measurements: what is wanted, by name.
        bos_token_id: the token that starts a window where it starts the sequence.
        known_losses: float32 losses under the full context, where short contexts are all that is left to compute.

    Returns:
        For each measurement a float32 array with the numbers of all sequences, one after the other.
    """
    entropy = any(measurement.quantity == "entropy" for measurement in measurements.values())
    windows = {measurement.window for measurement in measurements.values()} - {None}
    windows_only = known_losses is not None and all(of.window for of in measurements.values())
    requests = [] if windows_only else [Request(ids, entropy=entropy) for ids in sequences]
    whole = len(requests)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).tolist()
    # Where in the concatenation of all sequences the result of each further request belongs.
    places: list[tuple[Window, int]] = []
    for window in windows:
        assert window is not None
        for ids, offset in zip(sequences, offsets, strict=False):
            for span in plan_windows(len(ids), window.size, window.stride):
                requests.append(Request(window_ids(ids, span, bos_token_id), span.first_scored - span.start))
                places.append((window, offset + span.first_scored))
    results = engine.score(requests)
    full = np.concatenate(results[:whole], axis=1) if known_losses is None or whole else known_losses[None]
    losses = {window: full[0].copy() for window in windows} | {None: full[0]}
    for (window, place), result in zip(places, results[whole:], strict=True):
        losses[window][place : place + result.shape[1]] = result[0]
    return {
        name: full[1] if measurement.quantity == "entropy" else losses[measurement.window]
        for name, measurement in measurements.items()
    }


def round_contrast(contrast: np.ndarray) -> np.ndarray:
    """Round to multiples of 1/512 nat and to the range of float16; float32 in and out.

    A difference is often near 0, where float16 would keep digits far below what its two losses are good for (they are
    stored with a spacing of 1/512 from 2 nats on, and engines differ by about 0.03). Those digits cost storage.
    """
    rounded = np.round(contrast / CONTRAST_STEP) * CONTRAST_STEP + np.float32(0)  # the sum turns -0 into 0
    return np.clip(rounded, -FLOAT16_MAX, FLOAT16_MAX)


def check_scores(scores: np.ndarray, lengths: np.ndarray, model: str, document_ids: pa.ChunkedArray) -> None:
    """Raise UserError if a token that has something before it has no number, or one that no loss or entropy can be."""
    ends = np.cumsum(lengths)
    bad = ~((scores >= -ROUNDING) & (scores <= FLOAT16_MAX))
    bad[ends - lengths] = False
    if bad.any():
        position = int(np.argmax(bad))
        row = int(np.searchsorted(ends, position, side="right"))
        raise UserError(
            f"{model}: gives token {position - int(ends[row] - lengths[row])} of a sequence of document "
            f"'{document_ids[row].as_py()}' the score {scores[position]}; check the checkpoint, or try --dtype float32 "
            "with a new --output"
        )


def part_path(output: Location, name: str) -> Location:
    """Where the part record of shard `name` lies while the run is in progress."""
    return output / PROGRESS / name


def write_part(output: Location, entry: ShardEntry, counts: dict[str, ValueCounts]) -> None:
    """Record that a shard is complete: its manifest entry and its value counts, as one Parquet file."""
    table = to_table(counts).replace_schema_metadata({ENTRY_KEY: SHARD_ENTRY.dump_json(entry)})
    with atomic_write(part_path(output, entry.name)) as file:
        pq.write_table(table, file, compression="zstd")


def read_part(output: Location, name: str) -> ShardEntry | None:
    """The entry of a part record; None unless it is there and the shard has the recorded size."""
    path = part_path(output, name)
    if not path.exists():
        return None
    entry = SHARD_ENTRY.validate_json(pq.read_schema(path).metadata[ENTRY_KEY])
    shard = output / name
    return entry if shard.exists() and shard.stat().st_size == entry.bytes else None


def merge_parts(output: Location, names: list[str]) -> dict[str, ValueCounts]:
    """Value counts of the whole set: the sums over the part records of the shards `names`."""
    parts = pl.scan_parquet([str(part_path(output, name)) for name in names])
    counts = parts.group_by("column", "value").agg(pl.col("count").sum()).collect()
    return from_table(counts.to_arrow())
