"""Schedules over the steps of a run: learning rate, and linear warm-up of weights and loss coefficients."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from weighted_mtp.schemas.configs import OptimizerConfig

CONTINUED_SHARE = 0.1
"""Learning rate of steps after the end of a schedule that decays to 0, as a share of the peak.

A tenth of the peak is the final learning rate of many pretraining runs (arXiv 2203.15556, section 3.1)."""


def make_learning_rate_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Linear warm-up to the peak learning rate, then cosine or linear decay to 0 at `steps`, or no decay.

    From step `steps` on, the learning rate is constant: the peak if there was no decay, else `CONTINUED_SHARE` of it.
    """
    constant = config.schedule == "constant"
    name = "constant_with_warmup" if constant else config.schedule
    schedule = get_scheduler(name, optimizer, round(config.warmup_ratio * steps), steps)
    scheduled = schedule.lr_lambdas[0]  # the same for all groups of parameters

    def factor(step: int) -> float:
        """Share of the peak learning rate at `step`."""
        return scheduled(step) if step < steps else 1.0 if constant else CONTINUED_SHARE

    schedule.lr_lambdas = [factor] * len(optimizer.param_groups)
    return schedule


def linear_warmup(step: int, warmup_ratio: float, steps: int) -> float:
    """Linear warm-up factor, 0 to 1, at `step` of `steps`; 1 from `warmup_ratio * steps` on."""
    warmup_steps = warmup_ratio * steps
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0
