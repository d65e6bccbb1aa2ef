"""Training on several devices: every process holds the whole model (DDP) or a shard of it (FSDP2).

Under FSDP2 each decoder layer of the trunk is gathered while it runs. Embeddings, norms, the unembedding and all heads
are gathered for the whole of `MTPModel.forward`, which uses the unembedding for its loss.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.decoder_layers import trunk_layers
from weighted_mtp.training.model.mtp_model import MTPModel

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; use FSDP2 "
    "(accelerate launch --use_fsdp --fsdp_version 2)",
}
UNSUPPORTED_WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "--fsdp_offload_params is not supported; leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "--fsdp_activation_checkpointing: give --activation_checkpointing to wmtp train "
    "instead",
}


@contextmanager
def sharding_requested(fsdp: bool) -> Iterator[bool]:
    """Whether the setting or `accelerate launch --use_fsdp` requests sharding; hides FSDP from accelerate inside.

    Otherwise accelerate would wrap modules that must stay unwrapped and reject CPUs, and transformers would leave
    weights uninitialised in all but the first process.

    Raises:
        UserError: `accelerate launch` requests something unsupported.
    """
    launched = _is_set("ACCELERATE_USE_FSDP")
    for variable, sentence in UNSUPPORTED.items():
        if _is_set(variable):
            raise UserError(sentence)
    if launched:
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise UserError(f"accelerate launch --use_fsdp: FSDP {version} is not supported; give --fsdp_version 2")
        for variable, sentence in UNSUPPORTED_WITH_FSDP.items():
            if _is_set(variable):
                raise UserError(f"accelerate launch {sentence}")
    with patch_environment(accelerate_use_fsdp="false"):
        yield fsdp or launched


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def distribute(accelerator: Accelerator, model: MTPModel, *, shard: bool) -> nn.Module:
    """Place `model` on the devices: with `shard` sharded in place, else under DDP, or unwrapped for one process."""
    if not (shard and distributed.is_initialized()):
        return accelerator.prepare(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    shard_model(model, mesh, bfloat16=accelerator.mixed_precision == "bf16")
    return model


def shard_model(model: MTPModel, mesh: DeviceMesh, *, bfloat16: bool) -> None:
    """Shard `model` in place over the processes of `mesh`; `bfloat16` is whether autocast computes in it."""
    # Gather layers in the autocast dtype, which matrix products use anyway. Sum gradients in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in trunk_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def no_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Under DDP, accumulate gradients in this process only; the next backward pass outside reduces them.

    FSDP2 reduces after each backward pass: unreduced gradients would take full size in every process.
    """
    return nullcontext() if isinstance(model, FSDPModule) else accelerator.no_sync(model)


def reshard(model: nn.Module) -> None:
    """Free parameters still gathered after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def all_finite(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether all parameters are finite in all processes."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    finite = torch.stack([torch.isfinite(p).all() for p in parameters]).all()
    return int(accelerator.reduce(finite.int(), "sum")) == accelerator.num_processes


def full_state(accelerator: Accelerator, model: MTPModel) -> dict[str, Tensor] | None:
    """The whole state dict in CPU memory of the main process, None in the others. Tied parameters stay tied.

    All processes must call this. Tensors are gathered one at a time.
    """
    gathered: dict[int, Any] = {}
    names = model.state_dict(keep_vars=True)
    for value in names.values():
        if id(value) not in gathered:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            gathered[id(value)] = whole.detach().cpu() if accelerator.is_main_process else None
    return {name: gathered[id(value)] for name, value in names.items()} if accelerator.is_main_process else None
