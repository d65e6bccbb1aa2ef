"""Schedules over the steps of a run: learning rate, and linear warm-up of weights and loss coefficients."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from weighted_mtp.schemas.configs import OptimizerConfig

SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
"""Their names in transformers, where they differ."""

CONTINUED_SHARE = 0.1
"""Learning rate of steps after the end of a schedule that decays to 0, as a share of the peak.

A tenth of the peak is the final learning rate of many pretraining runs (arXiv 2203.15556, section 3.1)."""


def make_learning_rate_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """Linear warm-up to the peak learning rate, then a decay to the minimum at `steps`, or no decay.

    A cosine or linear decay begins after the warm-up. That of `wsd` takes the last steps, is 1 minus the square root of
    its progress (arXiv 2405.18392), and leaves the peak in between.

    From step `steps` on, the learning rate is constant: the peak if there was no decay, else the minimum, or
    `CONTINUED_SHARE` of the peak if that is 0.
    """
    constant = config.schedule == "constant"
    warmup = round(config.warmup_ratio * steps)
    options = None
    if config.schedule == "wsd":
        options = {
            "num_decay_steps": min(round(config.wsd_decay_ratio * steps), steps - warmup),
            "decay_type": "1-sqrt",
        }
    schedule = get_scheduler(SCHEDULES.get(config.schedule, config.schedule), optimizer, warmup, steps, options)
    scheduled = schedule.lr_lambdas[0]  # the same for all groups of parameters
    minimum = config.min_learning_rate_ratio

    def factor(step: int) -> float:
        """Share of the peak learning rate at `step`."""
        if step >= steps:
            return 1.0 if constant else minimum or CONTINUED_SHARE
        return scheduled(step) if step < warmup else minimum + (1.0 - minimum) * scheduled(step)

    schedule.lr_lambdas = [factor] * len(optimizer.param_groups)
    return schedule


def linear_warmup(step: int, warmup_ratio: float, steps: int) -> float:
    """Linear warm-up factor, 0 to 1, at `step` of `steps`; 1 from `warmup_ratio * steps` on."""
    warmup_steps = warmup_ratio * steps
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0
