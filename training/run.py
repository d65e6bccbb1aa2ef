"""The directory of a training run: its identity, its metrics, its checkpoints.

RUN/config.yaml        the resolved settings; `wmtp train --config RUN/config.yaml` repeats the run
RUN/run.json           what a continued run must agree on
RUN/metrics.jsonl      one line per logged step and per evaluation
RUN/checkpoints/       full training states, newest last
RUN/model/, RUN/heads/ the trained trunk as a Hugging Face checkpoint, and its heads
RUN/summary.json       written last: the run is finished
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from schemas.configs import TrainConfig
from schemas.errors import UserError
from schemas.files import write_text

OPERATIONAL = {
    "output", "micro_batch_size", "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints",
    "log_every", "trackers",
}  # fmt: skip
"""Settings that may change when a stopped run is continued: they do not touch what is trained."""


class RunDirectory:
    """Files of one training run; only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.summary_file = path / "summary.json"
        self.metrics_file = path / "metrics.jsonl"

    def claim(self, config: TrainConfig, inputs: dict[str, str]) -> None:
        """Take the directory for a run with these settings and input digests, or continue the one it holds.

        Raises:
            UserError: it holds something else, or a run that differs; the differing settings are named.
        """
        identity = {"config": config.model_dump(mode="json", exclude=OPERATIONAL), "inputs": inputs}
        record = self.path / "run.json"
        if record.exists():
            before = json.loads(record.read_text())
            if changed := sorted(_differences(before, identity)):
                raise UserError(
                    f"{self.path}: holds a run with other settings ({', '.join(changed)}); "
                    "repeat its settings to continue it, or choose another --output"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: already holds something else; choose another --output or remove it")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_text(record, json.dumps(identity, indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else None

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps later than `step`, which a continued run will log again."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            write_text(self.metrics_file, "".join(line for line in complete if json.loads(line)["step"] <= step))

    def latest_checkpoint(self) -> Path | None:
        """Newest complete checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def save_checkpoint(self, accelerator: Accelerator, step: int, keep: int) -> None:
        """Save the full training state; it gets its name only when it is complete, then old ones go."""
        final = self.checkpoints / f"step-{step:08d}"
        partial = self.checkpoints / f".step-{step:08d}"
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            partial.replace(final)
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
            for leftover in self.checkpoints.glob(".step-*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Dotted names of the leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        return [leaf for key in keys for leaf in _differences(before.get(key), after.get(key), f"{name}.{key}")]
    return [] if before == after else [name.removeprefix(".config.").removeprefix(".")]
