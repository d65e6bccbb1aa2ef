"""The directory of a training run, for commands that use its model or list it."""

import json
from collections.abc import Iterator
from typing import Any

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.storage.locations import Location

RUN_RECORD = "run.json"
"""The file that makes a directory a training run."""

SETTINGS = "config.yaml"
"""All settings of the run."""

METRICS = "metrics.jsonl"
"""Logged metrics, one line each."""

SUMMARY = "summary.json"
"""The file that makes a training run finished. It is written last."""

CHECKPOINTS = "checkpoints"
"""Directory of the training states inside a run."""

MODEL = "model"
"""Directory of the trained trunk inside a run."""

HEADS = "heads"
"""Directory of the trained heads inside a run."""


def trained_model(place: Location, flag: str) -> Location | None:
    """The Hugging Face checkpoint of a finished training run; None for any other directory or name.

    Args:
        place: directory of the run.
        flag: command line flag that names it, for messages.

    Raises:
        UserError: the run is not finished.
    """
    if not (place / RUN_RECORD).is_file():
        return None
    if not (place / SUMMARY).is_file() or not (place / MODEL).is_dir():
        raise UserError(f"{flag} {place}: this training run is not finished; repeat its command first")
    return place / MODEL


def read_metrics(path: Location) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, last first, without damaged ones; a killed process may have truncated the last."""
    if not path.is_file():
        return
    for line in reversed(path.read_bytes().splitlines()):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            yield values
