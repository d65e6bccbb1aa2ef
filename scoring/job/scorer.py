"""Scoring one shard: the engines compute token losses, contrasts are subtracted, the score columns are written."""

import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from weighted_mtp.schemas.errors import SHORTER_PATH, UserError, is_socket_path_error
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.rounding import round_float16, round_nats
from weighted_mtp.schemas.shard_set.shards import ShardReader, flat_values, list_column, list_lengths
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement, ScoringPlan
from weighted_mtp.scoring.conditions.short_context import plan_windows, window_ids
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.engines.loading import load_engine
from weighted_mtp.scoring.job.faults import OutOfMemoryError, fault_in, is_out_of_memory, measure_each, reason_for
from weighted_mtp.scoring.job.units import RejectedSequence, ScoredShard, SequenceKey

PROBE_REQUEST = Request(np.array([0, 1], dtype=np.int32))
"""A request that every model can score, to check that an engine works."""


@dataclass(frozen=True)
class ScoringTask:
    """Everything a worker needs to score any shard of a set; both locations are absolute."""

    source: ShardReader
    output: Location
    plan: ScoringPlan
    engine: EngineConfig
    bos_token_id: int | None


@dataclass(frozen=True)
class OneByOne:
    """One-by-one scoring of the sequences of a shard that lost workers.

    Attributes:
        given_up: sequences not to try, and why.
        announce: called with model fingerprint and row before each sequence.
    """

    given_up: Mapping[SequenceKey, str]
    announce: Callable[[str, int], None]


def load_scoring_engine(model: ScoringModel, config: EngineConfig) -> Engine:
    """Load a model into an engine.

    Raises:
        UserError: its files on this machine differ from the driver's.
    """
    directory = model.directory
    if model_fingerprint(directory, code=config.trust_remote_code) != model.fingerprint:
        raise UserError(
            f"{model.name}: {directory} on {socket.gethostname()} does not hold the checkpoint that the run "
            "started with; restore it there and rerun the same command"
        )
    return load_engine(directory, config)


class QueuedEngine:
    """An engine as one shard uses it: calls wait for their turn in the thread of the engines.

    Attributes:
        seconds: duration of the calls, without the wait.
    """

    def __init__(self, engine: Engine, thread: ThreadPoolExecutor) -> None:
        self.engine = engine
        self.thread = thread
        self.seconds = 0.0

    @property
    def computed_tokens(self) -> int:
        """See `Engine.computed_tokens`."""
        return self.engine.computed_tokens

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""

        def run() -> list[np.ndarray]:
            started = time.monotonic()
            try:
                return self.engine.score(requests)
            finally:
                self.seconds += time.monotonic() - started

        return self.thread.submit(run).result()


class ShardScorer:
    """Scores shards with the engines of one worker, each model loaded once.

    Several threads may score one shard each. The engines take the requests of one shard after those of another, never
    together: a score does not depend on the shards that a worker happens to hold. While the engines compute one shard,
    the requests of the next are already waiting for them.
    """

    def __init__(self, task: ScoringTask, load: Callable[[ScoringModel, EngineConfig], Engine]) -> None:
        """Load the engines.

        Args:
            task: what to score.
            load: creates an engine; `load_scoring_engine` except in tests and benchmarks.

        Raises:
            UserError: an engine cannot load or run its model.
            OutOfMemoryError: an engine does not fit into memory.
        """
        self.task = task
        # CUDA's current device and stream are per thread, so a single thread creates and uses the engines.
        self.engine_thread = ThreadPoolExecutor(1)
        self.engines: dict[str, Engine] = {}
        self.probed_tokens = 0
        for model in task.plan.models:
            engine = replace(task.engine, max_length=task.engine.max_length + task.plan.longest_prompt(model))
            try:
                loaded = self.engines[model.fingerprint] = self.engine_thread.submit(load, model, engine).result()
                QueuedEngine(loaded, self.engine_thread).score([PROBE_REQUEST])  # it may not run what it loads
            except UserError:
                raise
            except Exception as error:  # engines raise exceptions of any type
                if is_out_of_memory(error):
                    raise OutOfMemoryError(reason_for(error)) from error
                if is_socket_path_error(error):
                    raise UserError(f"{tempfile.gettempdir()}: {SHORTER_PATH}") from error
                remedy = "try --engine transformers" if task.engine.name == "vllm" else "check the checkpoint"
                if task.engine.engine_args:
                    remedy = f"check --engine_args, or {remedy}"
                message = f"{model.name}: {task.engine.name} cannot run it ({reason_for(error)}); {remedy}"
                raise UserError(message) from error
        self.probed_tokens = self.computed_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens computed by the engines so far, without the initial probes."""
        return sum(engine.computed_tokens for engine in self.engines.values()) - self.probed_tokens

    def score(self, shard: str, table: pa.Table, one_by_one: OneByOne | None = None) -> ScoredShard:
        """Append the score columns to the rows of a shard.

        Args:
            shard: its name.
            table: its content.
            one_by_one: settings of one-by-one scoring, if the shard lost workers.

        Raises:
            UserError: no sequence of the shard can be scored.
            OutOfMemoryError: an engine ran out of memory.
            BrokenEngineError: an engine stopped working.
        """
        engines = {name: QueuedEngine(engine, self.engine_thread) for name, engine in self.engines.items()}
        lengths = list_lengths(table["input_ids"])
        sequences = np.split(flat_values(table["input_ids"]), np.cumsum(lengths)[:-1])
        scores: dict[str, np.ndarray] = {}  # by column, float32 [tokens of the shard]
        rejects: list[RejectedSequence] = []
        for model in self.task.plan.models:
            reasons, scored = self._score_model(model, engines[model.fingerprint], sequences, table, one_by_one, scores)
            if reasons and not scored:
                raise UserError(
                    f"{model.name}: no sequence of {shard} can be scored ({min(reasons.items())[1]}); "
                    "check the checkpoint, or try --dtype float32 with a new --output"
                )
            for row, reason in sorted(reasons.items()):
                of_row = {name: table[name][row].as_py() for name in ("document_id", "start")}
                rejects.append(RejectedSequence(shard=shard, row=row, **of_row, model=model.name, reason=reason))
        for name, contrast in self.task.plan.contrasts.items():
            minuend, subtrahend = (
                scores[side] if side in scores else stored_scores(table, side)
                for side in (contrast.minuend, contrast.subtrahend)
            )
            scores[name] = minuend - subtrahend
        for name in self.task.plan.columns:
            in_nats = name in self.task.plan.in_nats
            rounded = round_nats(scores[name]) if in_nats else round_float16(scores[name])
            table = table.append_column(name, list_column(rounded, lengths))
        return ScoredShard(table, rejects, sum(engine.seconds for engine in engines.values()))

    def _score_model(
        self,
        model: ScoringModel,
        engine: Engine,
        sequences: list[np.ndarray],
        table: pa.Table,
        one_by_one: OneByOne | None,
        scores: dict[str, np.ndarray],
    ) -> tuple[dict[int, str], int]:
        """Add the columns of one model to `scores`, each float32 [tokens of the shard].

        Returns:
            Reasons why sequences could not be scored, by row, and the number of scored sequences.
        """
        plan = self.task.plan
        wanted = plan.measured_by(model)
        known = None  # stored losses under the full context, float32 [tokens] for each row
        if column := plan.stored_losses(model):
            known = np.split(stored_scores(table, column), np.cumsum([len(ids) for ids in sequences])[:-1])

        def measure_rows(rows: list[int]) -> list[np.ndarray]:
            known_losses = [known[row] for row in rows] if known else None
            some = [sequences[row] for row in rows]
            return measure(engine, some, list(wanted.values()), self.task.bos_token_id, known_losses)

        def find_fault(row: int, scores: np.ndarray) -> str | None:
            bos = self.task.bos_token_id
            firsts = [first_scored(measurement, sequences[row], bos) for measurement in wanted.values()]
            return fault_in(scores, firsts)

        known_faults = one_by_one.given_up if one_by_one else {}
        given_up = {row: why for (fingerprint, row), why in known_faults.items() if fingerprint == model.fingerprint}
        # Rows with NaN among their stored losses were rejected and recorded by an earlier run.
        rejected = {row for row, losses in enumerate(known or []) if np.isnan(losses[1:]).any()}
        rows = [row for row in range(len(sequences)) if row not in given_up.keys() | rejected]
        found: dict[int, np.ndarray] = {}  # by row, float32 [measurements, tokens of the row]
        for some in [[row] for row in rows] if one_by_one else [rows]:
            if one_by_one:
                one_by_one.announce(model.fingerprint, some[0])
            measured, reasons = measure_each(measure_rows, some, find_fault, lambda: engine.score([PROBE_REQUEST]))
            found |= measured
            given_up |= reasons
        scored = len(found)
        for row in given_up.keys() | rejected:
            found[row] = np.full((len(wanted), len(sequences[row])), np.nan, np.float32)
        lines = np.concatenate([found[row] for row in range(len(sequences))], axis=1)
        scores |= dict(zip(wanted, lines, strict=True))
        return given_up, scored


def stored_scores(table: pa.Table, column: str) -> np.ndarray:
    """A score column of a shard, float32 [tokens of the shard]."""
    return flat_values(table[column])


def measure(
    engine: Engine,
    sequences: list[np.ndarray],
    measurements: list[Measurement],
    bos_token_id: int | None,
    known_losses: list[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Compute all measurements of one model.

    Full sequences, prompted sequences and windows go to the engine in one call, to fill its batches best.

    Args:
        engine: the model.
        sequences: token ids, int32.
        measurements: what to measure.
        bos_token_id: BOS; if a sequence starts with it, so do its windows, and prompts follow it.
        known_losses: float32 full-context losses of each sequence, if stored. The first tokens of a short context keep
            these losses.

    Returns:
        For each sequence a float32 array [measurements, tokens].
    """
    scores = [np.full((len(measurements), len(ids)), np.nan, dtype=np.float32) for ids in sequences]
    requests: list[Request] = []
    targets: list[tuple[int, list[int], int]] = []  # per request: sequence, measurements, first token
    for prompt in dict.fromkeys(measurement.prompt for measurement in measurements):
        lines = [line for line, measurement in enumerate(measurements) if measurement.prompt == prompt]
        if known_losses is not None and all(measurements[line].window for line in lines):
            for of_sequence, losses in zip(scores, known_losses, strict=True):
                of_sequence[lines] = losses
            continue
        quantities = tuple(measurements[line].quantity for line in lines)
        for number, ids in enumerate(sequences):
            prompted, first = prompt.before(ids, bos_token_id) if prompt else (ids, 0)
            if first < len(prompted):
                requests.append(Request(prompted, first, quantities))
                targets.append((number, lines, len(ids) - (len(prompted) - first)))
    for line, window in enumerate(measurement.window for measurement in measurements):
        if window is None:
            continue
        for number, ids in enumerate(sequences):
            for span in plan_windows(len(ids), window.size, window.stride):
                requests.append(Request(window_ids(ids, span, bos_token_id), span.first_scored - span.start))
                targets.append((number, [line], span.first_scored))
    for (number, lines, first), result in zip(targets, engine.score(requests), strict=True):
        scores[number][lines, first : first + result.shape[1]] = result
    return scores


def first_scored(measurement: Measurement, ids: np.ndarray, bos_token_id: int | None) -> int:
    """The first token with a score: 0 after a prompt, unless the sequence starts with BOS, else 1."""
    return 0 if measurement.prompt and ids[0] != bos_token_id else 1
