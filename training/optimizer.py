"""AdamW and its learning rate schedule."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from weighted_mtp.schemas.configs import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, with weight decay on matrices only, and its learning rate schedule over `steps` steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return optimizer, get_scheduler(name, optimizer, round(config.warmup_ratio * steps), steps)
