"""The directory of a training run: its identity, its metrics, its checkpoints.

RUN/config.yaml        the resolved settings; `wmtp train --config RUN/config.yaml --output OTHER` repeats the run
RUN/run.json           settings and inputs that must not change when the run is resumed, and the number of steps
RUN/metrics.jsonl      one line per logged step and per evaluation
RUN/checkpoints/       full training states, newest last; removed when the run is finished
RUN/model/, RUN/heads/ the trained trunk as a Hugging Face checkpoint, and its heads
RUN/summary.json       written last; marks the run as finished
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.storage.files import fsync, fsync_tree, write_text
from weighted_mtp.schemas.storage.locations import remove_tree
from weighted_mtp.schemas.storage.training_run import (
    CHECKPOINTS,
    HEADS,
    METRICS,
    MODEL,
    RUN_RECORD,
    SETTINGS,
    SUMMARY,
    read_metrics,
)
from weighted_mtp.training.run.checkpoint import TrainingState
from weighted_mtp.training.run.object_store import ObjectStoreCopy
from weighted_mtp.training.run.preconditions import (
    REMOVED,
    TRACKING,
    check_run,
    fixed_settings,
    latest_checkpoint,
    read_summary,
)

logger = logging.getLogger("weighted_mtp")


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON lacks, with None."""
    return {name: None if value != value else value for name, value in record.items()}


class RunDirectory:
    """Files of one training run. Only the main process writes, into `path`; `publish` copies to the object store."""

    def __init__(
        self, config: TrainConfig, inputs: dict[str, str], store: ObjectStoreCopy | None, processes: int
    ) -> None:
        """Describe a run.

        Args:
            config: settings of the run.
            inputs: digests of the inputs.
            store: local and remote locations of the run, if its output is in an object store.
            processes: number of processes.
        """
        self.output = config.output
        self.store = store
        self.path = path = store.path if store else Path(str(config.output))
        self.config = config
        self.identity: dict[str, Any] = {
            "config": fixed_settings(config),
            "inputs": inputs,
        }
        if config.weights.is_live:  # losses are ranked within one forward pass of one process
            self.identity["passes"] = {"micro_batch_size": config.micro_batch_size, "processes": processes}
        self.record = path / RUN_RECORD
        self.checkpoints = path / CHECKPOINTS
        self.summary_file = path / SUMMARY
        self.metrics_file = path / METRICS

    def fetch(self, accelerator: Accelerator) -> None:
        """Download the run from an object store to every machine."""
        if self.store:
            accelerator.wait_for_everyone()  # until the main process has locked the run
            if accelerator.is_local_main_process:
                self.store.download_records()
                if self.summary() is None:
                    self.store.download_checkpoint()
            accelerator.wait_for_everyone()

    def publish(self, *names: str) -> None:
        """Upload files and directories of the run, if its output is in an object store."""
        if self.store:
            for name in names:
                self.store.upload(self.path / name, name)

    def check(self) -> None:
        """Check the directory, as `check_run` does."""
        check_run(self.output, self.path, self.identity, self.config.continue_steps)

    def claim(self, step: int, steps: int) -> None:
        """Write the run record, and drop metrics after `step`, because these steps will be logged again.

        `steps` is the number of steps that the run will have.
        """
        write_text(self.record, json.dumps(self.identity | {"steps": steps}, indent=2) + "\n")
        settings = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_text(self.path / SETTINGS, settings)
        if self.metrics_file.exists():
            lines = reversed(list(read_metrics(self.metrics_file)))
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self.publish(RUN_RECORD, SETTINGS, METRICS)
        if self.store:
            self.store.remove_checkpoints(self.config.max_checkpoints)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None if the run is not finished, or `--continue_steps` asks for more steps."""
        return read_summary(self.output, self.path, self.config.continue_steps)

    def reopen(self) -> None:
        """Mark the run as not finished, before the model of a continued run replaces that of the finished one."""
        self.summary_file.unlink(missing_ok=True)
        fsync(self.path)
        if self.store:
            self.store.remove_summary()

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and remove the checkpoints. Call it after saving."""
        self.publish(MODEL, HEADS, METRICS, TRACKING)
        write_text(self.summary_file, json.dumps(without_nan(summary), indent=2) + "\n")
        self.publish(SUMMARY)
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run, or what a killed process left of them; not if they are kept."""
        if self.config.keep_checkpoints or self.checkpoints.is_symlink():
            return
        removed = self.path / REMOVED
        remove_tree(removed)
        if self.checkpoints.exists():
            self.checkpoints.replace(removed)  # a killed process must not leave a part of a checkpoint
            remove_tree(removed)
        if self.store:
            remove_tree(self.store.remote / CHECKPOINTS)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, with null for NaN."""
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(without_nan(record)) + "\n")

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return latest_checkpoint(self.path)

    def load_checkpoint(self, accelerator: Accelerator, state: TrainingState) -> None:
        """Resume from the newest checkpoint, if there is one.

        Raises:
            UserError: the checkpoint cannot be loaded.
        """
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return
        try:
            state.load(accelerator, checkpoint)
        except Exception as error:  # torch and safetensors raise their own exceptions for damaged files
            where = self.output / CHECKPOINTS / checkpoint.name
            raise UserError(
                f"{where}: cannot be loaded ({first_line(error)}); remove it to continue from the previous one"
            ) from error
        if accelerator.is_main_process:
            logger.info("%s: continuing from %s", self.output, checkpoint.name)

    def save_checkpoint(self, accelerator: Accelerator, state: TrainingState, step: int) -> None:
        """Save the full training state under a temporary name, rename it when complete, then remove old checkpoints.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        final = self.checkpoints / f"step-{step:08d}"
        partial = self.checkpoints / f".step-{step:08d}"
        # With an object store each machine has its own directory; otherwise all share one.
        if accelerator.is_local_main_process if self.store else accelerator.is_main_process:
            # A killed run with more processes may have left more files.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            state.save(accelerator, partial)
        except Exception as error:  # safetensors and torch raise their own exceptions for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{final}: cannot be written ({first_line(error)}); free some space and rerun") from error
        accelerator.wait_for_everyone()
        if self.store:
            if accelerator.is_local_main_process:  # each machine holds the random states of its processes
                self.store.upload(partial, f"{CHECKPOINTS}/{final.name}")
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.store:
                self.publish(METRICS, TRACKING)  # extra lines are dropped on resume, missing ones are lost
                self.store.complete_checkpoint(final.name, self.config.max_checkpoints)
            fsync_tree(partial)
            partial.replace(final)
            fsync(self.checkpoints)
            for old in sorted(self.checkpoints.glob("step-*"))[: -self.config.max_checkpoints]:
                shutil.rmtree(old)
            for leftover in self.checkpoints.glob(".step-*"):
                shutil.rmtree(leftover)
        elif self.store and accelerator.is_local_main_process:
            shutil.rmtree(partial)
        accelerator.wait_for_everyone()
