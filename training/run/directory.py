"""The directory of a training run: its identity, its metrics, its checkpoints.

RUN/config.yaml        the resolved settings; `wmtp train --config RUN/config.yaml --output OTHER` repeats the run
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

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.files import LOCK, differences, fsync, fsync_tree, read_json, write_text
from weighted_mtp.training.run.checkpoint import TrainingState
from weighted_mtp.training.run.mirror import CHECKPOINTS, Mirror

OPERATIONAL = {
    "output", "micro_batch_size", "eval_input", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints",
    "loader_workers", "log_every", "trackers", "fsdp", "activation_checkpointing", "compile", "max_bad_steps",
    "ray_workers", "ray_address",
}  # fmt: skip
"""Settings that may change when a stopped run is continued: they do not touch what is trained.

Live weights depend on `micro_batch_size`, too."""

TRACKING = "wmtp"
"""Project name of the trackers; those that write files make a directory of this name."""

LOCATIONS = {"input", "mix", "model"}
"""Settings that a continued run compares by content."""


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for NaN, which JSON does not have."""
    return {name: None if value != value else value for name, value in record.items()}


class RunDirectory:
    """Files of one training run; only the main process writes, and in `path`, whose content `publish` passes on."""

    def __init__(self, config: TrainConfig, inputs: dict[str, str], mirror: Mirror | None, processes: int) -> None:
        """Describe a run.

        Args:
            config: its settings.
            inputs: digests of what it reads.
            mirror: where it works if its output is in an object store.
            processes: how many share the work.
        """
        self.output = config.output
        self.mirror = mirror
        self.path = path = mirror.path if mirror else Path(str(config.output))
        self.config = config
        self.identity: dict[str, Any] = {
            "config": config.model_dump(mode="json", exclude=OPERATIONAL | LOCATIONS),
            "inputs": inputs,
        }
        if config.weights.is_live:  # losses are ranked within one forward pass of one process
            self.identity["passes"] = {"micro_batch_size": config.micro_batch_size, "processes": processes}
        self.record = path / "run.json"
        self.checkpoints = path / CHECKPOINTS
        self.summary_file = path / "summary.json"
        self.metrics_file = path / "metrics.jsonl"

    def fetch(self, accelerator: Accelerator) -> None:
        """Bring what an object store holds of the run to every machine."""
        if self.mirror:
            accelerator.wait_for_everyone()  # until the main process has the run to itself
            if accelerator.is_local_main_process:
                self.mirror.download()
            accelerator.wait_for_everyone()

    def publish(self, *names: str) -> None:
        """Bring files and directories of the run to where its output belongs, if that is an object store."""
        if self.mirror:
            for name in names:
                self.mirror.upload(self.path / name, name)

    def check(self) -> None:
        """Check that the directory is empty, or holds this run, or one that never came to a checkpoint.

        Raises:
            UserError: it holds something else, or a run that differs; the differing settings are named.
        """
        if self.record.exists():
            changed = [name.removeprefix("config.") for name in differences(read_json(self.record), self.identity)]
            if changed and (self.latest_checkpoint() or self.summary_file.exists()):
                raise UserError(
                    f"{self.output}: holds a run with other settings ({', '.join(changed)}); "
                    "repeat its settings to continue it, or choose another --output"
                )
        elif self.output.exists() and any(path.name != LOCK for path in self.output.iterdir()):
            raise UserError(f"{self.output}: already holds something else; choose another --output or remove it")

    def claim(self, step: int) -> None:
        """Write down what runs here, and drop metrics of steps later than `step`, which will be logged again."""
        write_text(self.record, json.dumps(self.identity, indent=2) + "\n")
        settings = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_text(self.path / "config.yaml", settings)
        if self.metrics_file.exists():
            # A line that a kill cut short is logged again, too.
            lines = [line for line in self.metrics_file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(self.metrics_file, "".join(line + "\n" for line in kept))
        self.publish("run.json", "config.yaml", "metrics.jsonl")
        if self.mirror:
            self.mirror.remove_checkpoints(self.config.keep_checkpoints)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        return read_json(self.summary_file) if self.summary_file.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary of a run whose model is saved."""
        self.publish("model", "heads", "metrics.jsonl", TRACKING)
        write_text(self.summary_file, json.dumps(without_nan(summary), indent=2) + "\n")
        self.publish("summary.json")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, null for what is not a number."""
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(without_nan(record)) + "\n")

    def latest_checkpoint(self) -> Path | None:
        """Newest complete checkpoint."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def load_checkpoint(self, accelerator: Accelerator, state: TrainingState) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            UserError: it cannot be loaded.
        """
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return
        try:
            state.load(accelerator, checkpoint)
        except Exception as error:  # torch and safetensors have their own for damaged files
            where = self.output / CHECKPOINTS / checkpoint.name
            raise UserError(
                f"{where}: cannot be loaded ({first_line(error)}); remove it to continue from the one before"
            ) from error
        accelerator.print(f"{self.output}: continuing from {checkpoint.name}")

    def save_checkpoint(self, accelerator: Accelerator, state: TrainingState, step: int) -> None:
        """Save the full training state; it gets its name only when it is complete, then old ones go.

        Raises:
            UserError: it cannot be written.
        """
        final = self.checkpoints / f"step-{step:08d}"
        partial = self.checkpoints / f".step-{step:08d}"
        # Machines that work in a store have a directory each, others share one.
        if accelerator.is_local_main_process if self.mirror else accelerator.is_main_process:
            # A killed run may have had more processes, so more files.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            state.save(accelerator, partial)
        except Exception as error:  # safetensors and torch have their own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: cannot be written ({first_line(error)}); free some space and rerun") from error
        accelerator.wait_for_everyone()
        if self.mirror:
            if accelerator.is_local_main_process:  # other machines have the random states of their processes
                self.mirror.upload(partial, f"{CHECKPOINTS}/{final.name}")
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.mirror:
                self.publish("metrics.jsonl", TRACKING)  # lines that are too new do no harm, missing ones would
                self.mirror.complete_checkpoint(final.name, self.config.keep_checkpoints)
            fsync_tree(partial)
            partial.replace(final)
            fsync(self.checkpoints)
            for old in sorted(self.checkpoints.glob("step-*"))[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
            for leftover in self.checkpoints.glob(".step-*"):
                shutil.rmtree(leftover)
        elif self.mirror and accelerator.is_local_main_process:
            shutil.rmtree(partial)
        accelerator.wait_for_everyone()
