"""What the settings, the directories and the installed packages alone decide about a run. Imports no framework."""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import LOCK, differences, read_json_file
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.training_run import CHECKPOINTS, HEADS, METRICS, MODEL, RUN_RECORD, SETTINGS, SUMMARY

CHANGEABLE_ON_RESUME = {
    "output", "micro_batch_size", "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "max_checkpoints",
    "keep_checkpoints", "loader_workers", "log_every", "trackers", "fsdp", "activation_checkpointing", "compile",
    "max_bad_steps", "ray_workers", "ray_address", "continue_steps", "trust_remote_code",
    "dry_run", "plan",
}  # fmt: skip
"""Settings that may change when a stopped run is resumed, because they do not affect the result of its steps.

With live weights `micro_batch_size` affects the result and must not change. The digest of the model covers its code if
the code may run."""

LOCATIONS = {"input", "mix", "model"}
"""Settings whose content is compared when a run is resumed."""

TRACKING = "wmtp"
"""Project name for trackers, and directory of trackers that write files."""

SAVING = ".saving"
"""Directory of a model that is being saved."""

REMOVED = f".{CHECKPOINTS}"
"""Directory of checkpoints that are being removed."""

FILES = (RUN_RECORD, SETTINGS, METRICS, SUMMARY)
DIRECTORIES = (CHECKPOINTS, REMOVED, SAVING, MODEL, HEADS, TRACKING)
"""What a run writes, replaces or removes."""

TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Packages of a tracker, one of which it needs. The package of the others has the tracker's name."""


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Summary(BaseModel):
    """The part of `summary.json` that is shown. Metrics on --eval_input are extra fields; NaN is None."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Count | float | None]

    steps: Count
    continued_steps: Count = 0
    tokens: Count
    seconds: float
    tokens_per_second: float
    loss: float | None
    selected_share: float | None
    memory_gib: float
    bad_steps: Count
    no_signal_steps: Count


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that must not change when a run is resumed."""
    return config.model_dump(mode="json", exclude=CHANGEABLE_ON_RESUME | LOCATIONS)


def resolve_length(config: TrainConfig, sets: Iterable[ZippedSets]) -> TrainConfig:
    """The settings with the tokens per packed row; the default depends on the sets to train on."""
    longest = max(data.first.manifest.corpus.max_length for data in sets)
    return config.model_copy(update={"sequence_length": config.sequence_length or longest})


def in_bfloat16(dtype: str, *, gpu: bool) -> bool:
    """Whether `--dtype` stands for bfloat16; auto does on a GPU."""
    return dtype == "bfloat16" or (dtype == "auto" and gpu)


def check_run(output: Location, path: Path, identity: dict[str, Any], continue_steps: int) -> None:
    """Check that a directory is empty or holds the same run, or a run without a checkpoint.

    Args:
        output: the directory, for messages.
        path: the directory, or its copy on this machine.
        identity: what is known about the run, as in its record.
        continue_steps: steps after those of the schedule.

    Raises:
        UserError: it holds other files, or a run with different settings, which the message names; or a finished run
            without checkpoints is to be continued; or an entry of the run is a link.
    """
    if (path / RUN_RECORD).is_file():
        recorded = read_json_file(path / RUN_RECORD)
        if not isinstance(recorded, dict) or not all(isinstance(recorded.get(n), dict) for n in ("config", "inputs")):
            raise UserError(
                f"{output / RUN_RECORD}: is not the record of a training run; choose another --output, or restore it"
            )
        recorded = {name: recorded.get(name) for name in identity}
        changed = [name.removeprefix("config.") for name in differences(recorded, identity)]
        if changed and (latest_checkpoint(path) or any((output / name).exists() for name in (SUMMARY, MODEL, HEADS))):
            raise UserError(
                f"{output}: holds a run with other settings ({', '.join(changed)}); "
                "repeat its settings to continue it, or choose another --output"
            )
    elif output.exists() and any(entry.name != LOCK for entry in output.iterdir()):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")
    if read_summary(output, path, continue_steps) is not None:
        return
    check_entries(output, path)
    if (path / SUMMARY).exists() and latest_checkpoint(path) is None:
        raise UserError(
            f"--continue_steps {continue_steps}: {output} is finished and has no checkpoints; "
            f"only runs with --keep_checkpoints can be continued; train a new run with --model {output}"
        )


def check_entries(output: Location, path: Path) -> None:
    """Raise UserError if a run could not replace what it writes, or would write through a link to another place."""
    for names, is_kind, kind in ((FILES, Path.is_file, "file"), (DIRECTORIES, Path.is_dir, "directory")):
        for entry in (path / name for name in names):
            if os.path.lexists(entry) and (entry.is_symlink() or not is_kind(entry)):
                raise UserError(
                    f"{output / entry.name}: should be a {kind} that the run can replace, and no link; "
                    "move it away, or choose another --output"
                )


def read_summary(output: Location, path: Path, continue_steps: int) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run is not finished, or `continue_steps` asks for more steps.

    Raises:
        UserError: it is damaged.
    """
    if not (path / SUMMARY).is_file():
        return None
    try:
        summary = Summary.model_validate_json((path / SUMMARY).read_bytes())
    except ValueError as error:
        raise UserError(
            f"{output / SUMMARY}: is damaged ({first_line(error)}); restore it, or remove it to continue the run"
        ) from error
    return summary.model_dump() if continue_steps <= summary.continued_steps else None


def latest_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max((path / CHECKPOINTS).glob("step-*"), default=None)


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in names:
        if not any(map(is_installed, TRACKER_PACKAGES.get(name, (name,)))):
            raise UserError(f"--trackers: the package for '{name}' is not installed; install it or remove '{name}'")


def check_optimizer(kind: str) -> None:
    """Raise UserError if the package of an optimizer is not installed."""
    if kind == "adamw8bit" and not is_installed("torchao"):
        raise UserError(
            "--optimizer.kind adamw8bit: torchao is not installed; install weighted-mtp[adamw8bit], or use adamw"
        )


def is_installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
