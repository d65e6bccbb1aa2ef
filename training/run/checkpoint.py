"""Checkpoint format: the full training state in a directory, the same for one process, DDP and FSDP2.

shard-*.safetensors   parameters and optimizer state by name, one file per process
state.pt              learning rate schedule, loop, loader, and the names and sizes of the other files
random-00000.pt       random states of process 0

torch.distributed.checkpoint (DCP) reassembles the tensors for any number of processes. Nothing is unpickled: tensors
are in safetensors files, and everything else is read with `weights_only`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from weighted_mtp.training.optimizer import moment_tensors

STATE = "state.pt"


class TrainingState:
    """The contents of a checkpoint.

    Args:
        model: the unwrapped model.
        optimizer: its optimizer.
        scheduler: the learning rate schedule.
        stateful: other objects with a small `state_dict`, by name.
        seed: seeds the random states if the number of processes changes.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, stateful: dict[str, Any], seed: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.stateful = stateful
        self.seed = seed

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimizer state by name, with tied tensors only once."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            tensors[f"model.{name}"] = value.detach()
            for key, moment in self.optimizer.state.get(value, {}).items():
                for part, tensor in moment_tensors(moment).items():
                    tensors[f"optimizer.{name}.{key}{part}"] = tensor
        return tensors

    def save(self, accelerator: Accelerator, directory: Path) -> None:
        """Write into an existing, empty `directory`. All processes must call this; each writes its own files."""
        writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
        with _checkpointing():
            save(self.tensors(), storage_writer=writer, no_dist=not distributed.is_initialized())
        torch.save(_random_states(accelerator), directory / _random_file(accelerator))
        written = [_random_file(accelerator), *(path.name for path in directory.glob("*.safetensors"))]
        sizes = dict(gather_object([(name, (directory / name).stat().st_size) for name in written]))
        if accelerator.is_main_process:
            state = {name: value.state_dict() for name, value in self.stateful.items()}
            state |= {"scheduler": self.scheduler.state_dict(), "processes": accelerator.num_processes, "files": sizes}
            torch.save(state, directory / STATE)

    def load(self, accelerator: Accelerator, directory: Path) -> None:
        """Restore from `directory`, written by any number of processes.

        Random states are restored if the number of processes is unchanged, else reseeded.

        Raises:
            Exception: something is missing or damaged; the type depends on the file.
        """
        state = torch.load(directory / STATE, weights_only=True)
        for name, size in state["files"].items():
            if (directory / name).stat().st_size != size:
                raise ValueError(f"{name} is not {size} bytes long")
        make_state(self.optimizer)
        with _checkpointing():
            reader = HuggingFaceStorageReader(str(directory))
            load(self.tensors(), storage_reader=reader, no_dist=not distributed.is_initialized())
        # The settings determine the rest of its state. A step sets the learning rates.
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"] - 1
        self.scheduler.step()
        for name, value in self.stateful.items():
            value.load_state_dict(state[name])
        if state["processes"] == accelerator.num_processes:
            random_states = torch.load(directory / _random_file(accelerator), weights_only=True)
            torch.set_rng_state(random_states["cpu"])
            if accelerator.device.type == "cuda" and "device" in random_states:
                torch.cuda.set_rng_state(random_states["device"], accelerator.device)
        else:
            entropy = [self.seed, self.scheduler.last_epoch, accelerator.process_index]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@contextmanager
def _checkpointing() -> Iterator[None]:
    """Silence a DCP warning, and raise the first process's exception instead of `CheckpointException`.

    DCP warns about a single process even with `no_dist`. Its `CheckpointException` does not derive from `Exception`.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _random_file(accelerator: Accelerator) -> str:
    return f"random-{accelerator.process_index:05d}.pt"


def _random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(accelerator.device)
    return states


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Initialise the optimizer state with a step at learning rate 0; the checkpoint then overwrites it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.0  # a number or a tensor
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
