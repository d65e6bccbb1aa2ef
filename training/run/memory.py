"""The memory of an optimizer step, found by running it without data.

Every tensor of the step is a `FakeTensor`, which has a shape and no memory, and the processes of FSDP2 are a process
group that communicates with nobody. The real model, loss, sharding and optimizer therefore decide what is allocated and
when it is freed; only DDP's buckets, which are allocated in C++, are put in by size. The tensors are those of a CPU,
whose code differs from that of a GPU in one point that matters: the dtype of the products of the loss.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes the process group available
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.loss import chunked_loss
from weighted_mtp.training.loss.objectives import make_objective
from weighted_mtp.training.model.decoder_layers import checkpoint_activations
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.model.trunk import decoder_of
from weighted_mtp.training.optimizer import make_optimizer
from weighted_mtp.training.run.checkpoint import make_state
from weighted_mtp.training.sharding import shard_model

PARAMETERS = "parameters"
GRADIENTS = "gradients"
MOMENTS = "moments"
ACTIVATIONS = "activations"
LOSS = "heads and loss"
SHARING = "copies of other processes' shards, and their gradients"
BUCKETS = "buckets of DDP"
FORWARD, BACKWARD = "forward pass", "backward pass"
SHARING_OPERATORS = ("fsdp", "c10d", "_c10d_functional")
PRECISION = 1.001
"""Peaks that exceed an earlier one by a smaller factor are not recorded."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        processes: number of processes, one a device.
        shard: whether they shard parameters, gradients and moments (FSDP2) instead of copying them (DDP).
        gpu: whether they are GPUs.
        bfloat16: whether autocast computes in bfloat16.
    """

    processes: int
    shard: bool
    gpu: bool
    bfloat16: bool


@dataclass(frozen=True)
class StepMemory:
    """Memory of one device in a step after the first.

    Attributes:
        parts: bytes of each kind of tensors at the moment of the peak.
        peak_in: the part of the step with the peak.
        model: bytes of the parameters and buffers of the whole model.
    """

    parts: dict[str, int]
    peak_in: str
    model: int

    @property
    def peak(self) -> int:
        """Largest number of bytes at any moment."""
        return sum(self.parts.values())


class MemoryTracker(TorchDispatchMode):
    """Adds up the sizes of all tensors that exist, by the kind that `kind` had when they were made.

    Tensors whose sizes depend on values have the largest possible size: every token is a target. A condition that the
    code of a model checks, such as whether a sequence is long, holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = PARAMETERS
        self.part_of_step = FORWARD
        self.sizes: dict[int, tuple[weakref.ref, str, int]] = {}
        self.totals: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_in = self.part_of_step
        self.parameters: list[nn.Parameter] = []
        self.model: nn.Module | None = None

    def watch(self, model: nn.Module) -> None:
        """Tell the gradients of these parameters from other tensors, and forget earlier peaks.

        The first update of shards has such a peak: it makes whole tensors, which have no memory in a real run either,
        to find out how operators divide shards.
        """
        self.model, self.parameters = model, list(model.parameters())
        self.peak = {}

    def __enter__(self) -> "MemoryTracker":
        # FSDP2 allocates and frees gathered parameters with this method, which no operator calls.
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            self._forget(storage._cdata)
            self._add(storage, SHARING)
            self._find_peak()
            return storage

        self.patch = patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on tensors without data, and count the tensors that it makes."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # tensors made of tensors, such as shards: their parts come back here
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func is torch.ops.aten.nonzero.default:
            result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif func is torch.ops.aten._grouped_mm.default:  # whose shape function is stricter than the operator
            result = func(*(a.bfloat16() for a in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            result = func(*args, **(kwargs or {}))
        sharing = func.namespace in SHARING_OPERATORS
        made = False
        for tensor in tree_leaves((args, result) if sharing else result):
            # The shape functions of some operators make tensors on the meta device.
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                made |= self._count(tensor.untyped_storage(), sharing=sharing)
        if made:
            self._find_peak()
        return result

    def _count(self, storage: torch.UntypedStorage, *, sharing: bool) -> bool:
        """Count a storage once; returns whether it is new."""
        known = self.sizes.get(storage._cdata)
        if known is None:
            self._add(storage, SHARING if sharing else self.kind)
            return True
        if sharing and known[1] in (ACTIVATIONS, LOSS):
            self._forget(storage._cdata)
            self._add(storage, SHARING)
        return False

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.sizes[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, size
        self.totals[kind] += size

    def _forget(self, key: int) -> None:
        _, kind, size = self.sizes.pop(key, (None, PARAMETERS, 0))
        self.totals[kind] -= size

    def _find_peak(self) -> None:
        if sum(self.totals.values()) > PRECISION * sum(self.peak.values()):
            self.peak, self.peak_in = self._parts(), self.part_of_step

    @torch.no_grad()
    def _parts(self) -> dict[str, int]:
        """Bytes by kind, with gradients counted as such, whatever they were when they were made."""
        parts = Counter(self.totals)
        counted = set()
        gathered = [] if self.model is None else [p for p in self.model.parameters() if not isinstance(p, DTensor)]
        sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        for parameter in (*self.parameters, *gathered):
            if parameter.grad is None:
                continue
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            key = grad.untyped_storage()._cdata
            if key not in self.sizes or key in counted:
                continue
            counted.add(key)
            _, kind, size = self.sizes[key]
            parts[kind] -= size
            parts[SHARING if sharded and not isinstance(parameter, DTensor) else GRADIENTS] += size
        return parts


def step_memory(model: MTPModel, config: TrainConfig, devices: Devices, sequence_length: int) -> StepMemory:
    """Run an optimizer step without data, and return what it has in memory at its peak on one device.

    Every token counts as a target with weight. Live weights are left out: they need no more memory. Compiled layers are
    run as they are: they need less.

    Args:
        model: the model on the meta device, with the trainable parameters selected; it is used up.
        config: the settings.
        devices: the devices.
        sequence_length: tokens per packed row.

    Raises:
        UserError: the model's own code depends on the values of tensors.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    tracker = MemoryTracker()
    with torch.compiler.set_stance("force_eager"), fake_processes(devices) as mesh, products_of(devices):
        make_state(make_optimizer(nn.Linear(256, 16), config.optimizer))  # computes the tables of 8-bit moments
        try:
            with FakeTensorMode(), tracker:
                _run_steps(model, config, devices, sequence_length, mesh, tracker)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise UserError(
                f"--dry_run: the memory of {config.model} cannot be planned, because its code depends on the values of "
                f"tensors ({error.func}); measure a few steps instead"
            ) from error
    return StepMemory({kind: size for kind, size in tracker.peak.items() if size}, tracker.peak_in, size)


def allocate(model: nn.Module) -> None:
    """Replace all parameters and buffers, which are on the meta device, by empty ones; tied ones stay tied."""
    new: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if old not in new:
                empty = torch.empty(old.shape, dtype=old.dtype)
                new[old] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
            setattr(module, name, new[old])


def _run_steps(
    model: MTPModel,
    config: TrainConfig,
    devices: Devices,
    sequence_length: int,
    mesh: DeviceMesh | None,
    tracker: MemoryTracker,
) -> None:
    """Make the moments with a step of zero gradients, then run at most two forward and backward passes of another step.

    The update after them, when there are no activations, needs less: AdamW works in place, and 8-bit AdamW has the
    temporary tensors of one parameter.
    """
    allocate(model)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if mesh is not None:
        shard_model(model, mesh, bfloat16=devices.bfloat16)
    tracker.kind = BUCKETS
    copied = devices.processes > 1 and mesh is None
    buckets = [torch.empty_like(p) for p in model.parameters() if p.requires_grad and copied]
    tracker.kind = MOMENTS
    optimizer = make_optimizer(model, config.optimizer)
    model.train()
    make_state(optimizer)

    tracker.watch(model)
    tracker.kind = ACTIVATIONS
    decoder_of(model.trunk).register_forward_hook(lambda *_: setattr(tracker, "kind", LOSS))
    rows = config.batch_size // devices.processes
    shape = min(config.micro_batch_size, rows), sequence_length
    ids, weights = torch.zeros(shape, dtype=torch.int64), torch.ones(shape)
    objective = make_objective(config.objective)
    for _ in range(min(-(-rows // shape[0]), 2)):  # in the second, memory also holds the gradients of the first
        tracker.kind, tracker.part_of_step = ACTIVATIONS, FORWARD
        with torch.autocast("cpu", torch.bfloat16, enabled=devices.bfloat16):
            loss, _ = model(ids, ids.clone(), weights, objective=objective)
        tracker.kind, tracker.part_of_step = ACTIVATIONS, BACKWARD
        (loss * devices.processes).backward()
        del loss
    del buckets  # until here they are in memory


@contextmanager
def fake_processes(devices: Devices) -> Iterator[DeviceMesh | None]:
    """The processes of FSDP2, of which only this one exists; None where nothing is sharded."""
    if not devices.shard or devices.processes == 1:
        yield None
        return
    distributed.init_process_group("fake", rank=0, world_size=devices.processes, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (devices.processes,))
    finally:
        distributed.destroy_process_group()


def products_of(devices: Devices) -> AbstractContextManager[Any]:
    """Compute the products of the loss in the dtype of these devices."""
    return patch.object(chunked_loss, "FLOAT32_PRODUCTS", set()) if devices.gpu else nullcontext()
