"""Schedules over the steps of a run: learning rate, and linear warm-up of weights and loss coefficients."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from weighted_mtp.schemas.configs import OptimizerConfig


def make_learning_rate_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Linear warm-up to the peak learning rate, then cosine or linear decay to 0 at `steps`, or no decay."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, round(config.warmup_ratio * steps), steps)


def linear_warmup(step: int, warmup_ratio: float, steps: int) -> float:
    """Linear warm-up factor, 0 to 1, at `step` of `steps`; 1 from `warmup_ratio * steps` on."""
    warmup_steps = warmup_ratio * steps
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0
