"""The plan of a training run: its length, and the memory that it needs on each device. Reads no weights."""

import os
from dataclasses import dataclass

import numpy as np
import torch

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import load_config
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.storage.locations import local_name
from weighted_mtp.training.data.mixing import make_loader
from weighted_mtp.training.loss.shifted_targets import valid_targets
from weighted_mtp.training.model.mtp_model import MTPModel, build_untrained, trunk_source
from weighted_mtp.training.model.trainable_parameters import select_trainable
from weighted_mtp.training.model.trunk import ON_GPU_ONLY
from weighted_mtp.training.run.inputs import RunInputs, open_inputs
from weighted_mtp.training.run.memory import Devices, StepMemory, step_memory
from weighted_mtp.training.run.preconditions import in_bfloat16
from weighted_mtp.training.sharding import sharding_requested
from weighted_mtp.training.weighting.batch import BatchWeighting


@dataclass(frozen=True)
class RunLength:
    """How much a run reads. Numbers of tokens and targets are extrapolated from the first batch.

    Attributes:
        steps: optimizer steps.
        epochs: passes over --input.
        tokens: tokens without padding.
        targets: targets of the first offset.
        weighted_targets: those with weight; with live weights, those with a score.
    """

    steps: int
    epochs: float
    tokens: int
    targets: int
    weighted_targets: int


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do and need.

    Attributes:
        config: the settings, with `sequence_length` resolved.
        devices: the planned devices.
        length: how much the run reads.
        parameters: number of parameters of trunk and heads.
        trainable: number of those that are trained.
        attention: attention implementation of the planned step.
        memory: memory of each device.
        available: bytes of a device's memory, or None if unknown.
    """

    config: TrainConfig
    devices: Devices
    length: RunLength
    parameters: int
    trainable: int
    attention: str
    memory: StepMemory
    available: float | None


def plan(config: TrainConfig, progress: MakeBar = hidden_bar) -> TrainPlan:
    """Plan a run without writing anything. Checks the inputs and settings as `train` does.

    What needs the model to compute is left to `train`: that its logits are its hidden states times the unembedding, and
    that it separates packed documents.

    Raises:
        UserError: input, model or settings are incompatible, or the model's memory cannot be planned.
    """
    with sharding_requested(config.fsdp) as shard:
        devices = planned_devices(config, shard=shard)
    inputs = open_inputs(config, devices.processes)
    config = inputs.config
    attention = planned_attention(config)
    with torch.device("meta"):
        model = make_model(config, attention)
    inputs.check_fit(model)
    parameters = list(model.parameters())
    return TrainPlan(
        config=config,
        devices=devices,
        length=run_length(inputs, progress),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        attention=model.trunk.config._attn_implementation,
        memory=step_memory(model, config, devices, inputs.sequence_length),
        available=available_memory(config, devices),
    )


def check_memory(plan: TrainPlan) -> None:
    """Raise UserError, with settings that need less, if the run does not fit into the memory of its devices."""
    config, devices = plan.config, plan.devices
    if plan.available is None or plan.memory.peak <= plan.available:
        return
    remedies = {
        "a smaller --micro_batch_size": min(config.micro_batch_size, config.batch_size // devices.processes) > 1,
        "--activation_checkpointing": not config.activation_checkpointing,
        "--fsdp": devices.processes > 1 and not devices.shard,
        "--optimizer.kind adamw8bit": config.optimizer.kind == "adamw",
        "--trainable lora": config.trainable != "lora",
        "more devices": devices.shard or devices.processes == 1,
    }
    raise UserError(
        f"--model {config.model}: does not fit into the memory of the devices; try "
        + ", or ".join(remedy for remedy, applies in remedies.items() if applies)
    )


def planned_devices(config: TrainConfig, *, shard: bool) -> Devices:
    """The devices in the settings, else those of the launcher and of this machine."""
    launched = config.ray_workers or int(os.environ.get("WORLD_SIZE", "1"))
    gpu = config.plan.device == "cuda" or (config.plan.device == "auto" and torch.cuda.is_available())
    return Devices(
        processes=config.plan.processes or launched,
        shard=shard,
        gpu=gpu,
        bfloat16=in_bfloat16(config.dtype, gpu=gpu),
    )


def planned_attention(config: TrainConfig) -> str | None:
    """The attention to plan with: eager for a soft-cap, and `sdpa`, which needs a mask, for kernels of a GPU."""
    if config.attention == "auto":
        source = local_name(trunk_source(config.model))
        trunk = load_config(f"--model {config.model}", source, trust_remote_code=config.trust_remote_code)
        return "eager" if getattr(trunk.get_text_config(), "attn_logit_softcapping", None) else None
    return "sdpa" if config.attention in ON_GPU_ONLY else config.attention


def make_model(config: TrainConfig, attention: str | None) -> MTPModel:
    """The model with its trainable parameters selected, and with values that mean nothing."""
    model = build_untrained(
        config.model,
        config.heads,
        from_scratch=config.from_scratch,
        attention=attention,
        trust_remote_code=config.trust_remote_code,
    )
    select_trainable(model.trunk, config)
    return model


def run_length(inputs: RunInputs, progress: MakeBar) -> RunLength:
    """Count the steps of a run, and the tokens and targets of its first batch.

    Raises:
        UserError: a set lacks a score column, or has nothing to predict.
    """
    config = inputs.config
    loader = make_loader(config, inputs.shards, inputs.mixed, inputs.sequence_length, progress)
    rows_per_epoch = loader.rows_per_epoch()
    steps = inputs.scheduled_steps(rows_per_epoch) + config.continue_steps
    weighting = BatchWeighting.make(config.weights)
    rows = next(loader.batches(config.batch_size))
    batch = weighting.weigh_rows(rows, 1.0, np.random.default_rng(config.seed))
    weights = torch.from_numpy(batch.weights)[:, 1:]
    selected = weights.isfinite().all(-1) if weighting.live else weights != 0
    valid = valid_targets(torch.from_numpy(batch.position_ids), 1)
    return RunLength(
        steps=steps,
        epochs=steps * config.batch_size / rows_per_epoch,
        tokens=steps * int(batch.tokens.sum()),
        targets=steps * int(valid.sum()),
        weighted_targets=steps * int((valid & selected).sum()),
    )


def available_memory(config: TrainConfig, devices: Devices) -> float | None:
    """Bytes of memory of a device: of the settings, else of the first GPU of this machine; None if unknown."""
    if config.plan.memory_gib is not None:
        return config.plan.memory_gib * 2**30
    if devices.gpu and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None
