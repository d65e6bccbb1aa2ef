"""The entry of a training run in the catalogue of `wmtp list`. Reads records and metrics only."""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.training_run import METRICS, RUN_RECORD, SUMMARY, read_metrics

Steps = Annotated[int, Field(ge=0, lt=1 << 63)]
Record = TypeVar("Record", bound=BaseModel)
HELD_OUT = "eval_loss_"
"""Start of the names of held-out losses in metrics and summaries."""


@dataclass(frozen=True)
class RunEntry:
    """Facts about one training run.

    Attributes:
        finished: whether it has all its steps and its model.
        steps: steps done, or logged if it is not finished.
        total: number of steps that it will have; None if not recorded.
        loss: last logged loss, in nats.
        held_out: last held-out loss of each prediction, in nats.
        input: digests of the sets in --input.
        mix: digests of the sets in --mix, after the share of the rows that they give.
        bytes: size of all its files.
    """

    finished: bool
    steps: int
    total: int | None
    loss: float | None
    held_out: dict[str, float]
    input: list[str]
    mix: list[tuple[str, list[str]]]
    bytes: int


class RunRecord(BaseModel):
    """The part of `run.json` that is shown."""

    inputs: dict[str, str]
    steps: Steps | None = None


class RunSummary(BaseModel):
    """`summary.json`; its losses are extra fields."""

    model_config = ConfigDict(extra="allow")

    steps: Steps


def read_run(path: Location, size: int) -> RunEntry:
    """The entry of the run in `path`, whose files have `size` bytes.

    Raises:
        UserError: a record is damaged.
    """
    record = read_record(path / RUN_RECORD, RunRecord)
    summary = read_record(path / SUMMARY, RunSummary) if (path / SUMMARY).is_file() else None
    finished = summary is not None and summary.steps >= (record.steps or 0)
    if summary is not None and finished:
        steps, lines = summary.steps, [summary.model_extra or {}]
    else:
        lines = list(read_metrics(path / METRICS))
        steps = next((line["step"] for line in lines if isinstance(line.get("step"), int)), 0)
    held_out = next((losses for line in lines if (losses := held_out_losses(line))), {})
    parts = [part.partition(" ") for part in record.inputs.get("mix", "").split("; ") if part]
    return RunEntry(
        finished=finished,
        steps=steps,
        total=record.steps,
        loss=next((loss for line in lines if (loss := number(line.get("loss"))) is not None), None),
        held_out=held_out,
        input=record.inputs.get("input", "").split(","),
        mix=[(share, digests.split(",")) for share, _, digests in parts],
        bytes=size,
    )


def read_record(path: Location, kind: type[Record]) -> Record:
    """Read a JSON file of a run.

    Raises:
        UserError: it is not JSON, or lacks a field.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); restore it, or train the run again") from error


def held_out_losses(values: dict[str, Any]) -> dict[str, float]:
    """The held-out loss of each prediction in one line of metrics, or in a summary."""
    losses = {name: number(value) for name, value in values.items() if name.startswith(HELD_OUT)}
    return {name.removeprefix(HELD_OUT): loss for name, loss in losses.items() if loss is not None}


def number(value: Any) -> float | None:
    """A number of a JSON file as a float; None for anything else, and for numbers beyond the range of floats."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None
