"""What the settings, the directories and the installed packages alone decide about a run. Imports no framework."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import LOCK, differences, read_json_file
from weighted_mtp.schemas.storage.locations import Location
from weighted_mtp.schemas.storage.training_run import CHECKPOINTS, RUN_RECORD, SUMMARY

CHANGEABLE_ON_RESUME = {
    "output", "micro_batch_size", "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "max_checkpoints",
    "keep_checkpoints", "loader_workers", "log_every", "trackers", "fsdp", "activation_checkpointing", "compile",
    "max_bad_steps", "ray_workers", "ray_address", "continue_steps", "trust_remote_code",
}  # fmt: skip
"""Settings that may change when a stopped run is resumed, because they do not affect the result of its steps.

With live weights `micro_batch_size` affects the result and must not change. The digest of the model covers its code if
the code may run."""

LOCATIONS = {"input", "mix", "model"}
"""Settings whose content is compared when a run is resumed."""

TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Packages of a tracker, one of which it needs. The package of the others has the tracker's name."""


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that must not change when a run is resumed."""
    return config.model_dump(mode="json", exclude=CHANGEABLE_ON_RESUME | LOCATIONS)


def resolve_length(config: TrainConfig, sets: Iterable[ZippedSets]) -> TrainConfig:
    """The settings with the tokens per packed row; the default depends on the sets to train on."""
    longest = max(data.first.manifest.corpus.max_length for data in sets)
    return config.model_copy(update={"sequence_length": config.sequence_length or longest})


def check_run(output: Location, path: Path, identity: dict[str, Any], continue_steps: int) -> None:
    """Check that a directory is empty or holds the same run, or a run without a checkpoint.

    Args:
        output: the directory, for messages.
        path: the directory, or its copy on this machine.
        identity: what is known about the run, as in its record.
        continue_steps: steps after those of the schedule.

    Raises:
        UserError: it holds other files, or a run with different settings, which the message names; or a finished run
            without checkpoints is to be continued.
    """
    if (path / RUN_RECORD).exists():
        recorded = read_json_file(path / RUN_RECORD)
        if isinstance(recorded, dict):
            recorded = {name: recorded.get(name) for name in identity}
        changed = [name.removeprefix("config.") for name in differences(recorded, identity)]
        if changed and (latest_checkpoint(path) or (path / SUMMARY).exists()):
            raise UserError(
                f"{output}: holds a run with other settings ({', '.join(changed)}); "
                "repeat its settings to continue it, or choose another --output"
            )
    elif output.exists() and any(entry.name != LOCK for entry in output.iterdir()):
        raise UserError(f"{output}: already holds something else; choose another --output or remove it")
    unfinished = read_summary(output, path, continue_steps) is None
    if (path / SUMMARY).exists() and unfinished and latest_checkpoint(path) is None:
        raise UserError(
            f"--continue_steps {continue_steps}: {output} is finished and has no checkpoints; "
            f"only runs with --keep_checkpoints can be continued; train a new run with --model {output}"
        )


def read_summary(output: Location, path: Path, continue_steps: int) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run is not finished, or `continue_steps` asks for more steps.

    Raises:
        UserError: it is damaged.
    """
    if not (path / SUMMARY).exists():
        return None
    summary = read_json_file(path / SUMMARY)
    if not isinstance(summary, dict):
        raise UserError(f"{output / SUMMARY}: is damaged; restore it, or remove it to continue the run")
    return summary if continue_steps <= summary.get("continued_steps", 0) else None


def latest_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max((path / CHECKPOINTS).glob("step-*"), default=None)


def check_trackers(names: Iterable[str]) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for name in names:
        if not any(map(is_installed, TRACKER_PACKAGES.get(name, (name,)))):
            raise UserError(f"--trackers: the package for '{name}' is not installed; install it or remove '{name}'")


def is_installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
