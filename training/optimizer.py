"""The optimizer: AdamW, with moments in float32 or in 8 bits."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp.schemas.configs import OptimizerConfig

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 256
"""Values of 8 bits that share a scale, powers of two."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas}
    if config.kind == "adamw8bit":
        return _adamw_8bit(groups, settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _adamw_8bit(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW of torchao, with moments of one byte and a float32 scale for each block of 32 to 256 (arXiv 2110.02861).

    Blocks divide a row evenly, so that sharding by rows changes no block. Moments stay in float32 for vectors, for
    matrices whose rows are no multiple of 32 values, and for tensors, or shards, of fewer than 4096 values.
    """
    from torchao.optim import AdamW8bit  # optional, and takes seconds to import

    class RowwiseAdamW8bit(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            row = p[0].numel()
            if p.ndim < 2 or row % block_size:
                return torch.zeros_like(p)
            return AdamW8bit._subclass_zeros(p, signed, math.gcd(row, LARGEST_BLOCK))

    return RowwiseAdamW8bit(groups, **settings, block_size=SMALLEST_BLOCK)


def moment_tensors(moment: Tensor) -> dict[str, Tensor]:
    """An entry of the optimizer's state as ordinary tensors that share its memory, by the ends of their names.

    An 8-bit moment (R, ...) of R rows has codes of its own shape and scales (R, blocks in a row), both with its
    placement over processes.
    """
    local: Any = moment.to_local() if isinstance(moment, DTensor) else moment
    if not hasattr(local, "codes"):
        return {"": moment}
    parts = {".codes": local.codes, ".scales": local.scale.view(len(local.codes), -1)}
    if isinstance(moment, DTensor):
        return {name: _placed_like(part, moment) for name, part in parts.items()}
    return parts


def _placed_like(rows: Tensor, moment: DTensor) -> DTensor:
    """A tensor of which this process holds `rows`, with the rows of `moment` in all processes."""
    shape = torch.Size((moment.shape[0], *rows.shape[1:]))
    return DTensor.from_local(
        rows, moment.device_mesh, moment.placements, run_check=False, shape=shape, stride=rows.stride()
    )
