"""What is minimised for a chunk of logits, with its gradient in closed form.

An objective sees a chunk of logits once, in float32 or wider, and may overwrite it: `training.loss.output_layer` holds
one chunk at a time, and forms the gradient of the logits in the memory of the logits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_mtp.schemas.configs import ObjectiveConfig

BEST_BETA = -0.25
"""The exponent that served later reinforcement learning best (arXiv 2512.22955)."""

LEAST_DOUBT = torch.finfo(torch.float32).eps
"""1 - p is raised to a negative power from here on: below it p is 1 in float32, and its loss 0."""


class ChunkLosses(NamedTuple):
    """What an objective finds in a chunk of logits.

    Attributes:
        values: (C,) what is minimised.
        losses: (C,) what is logged and ranked as the loss, nats.
        correct: (C,) bool, whether the target is the most likely token.
        gradient: maps weights (C,) to the gradient (C, V) of the weighted sum of `values` with respect to the logits,
            in their memory; to be called once.
    """

    values: Tensor
    losses: Tensor
    correct: Tensor
    gradient: Callable[[Tensor], Tensor]


class Objective(ABC):
    """What is minimised for each row."""

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V), which are overwritten, for what the objective takes as targets (C,) int64."""


class CrossEntropy(Objective):
    """The negative log-likelihood of the target."""

    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for token ids (C,)."""
        sums, losses, correct = exponentials(logits, targets)

        def gradient(weights: Tensor) -> Tensor:
            logits.mul_(weights[:, None] / sums)
            return logits.scatter_add_(-1, targets[:, None], -weights[:, None])

        return ChunkLosses(losses, losses, correct, gradient)


class DiversityOrPrecision(Objective):
    """Next-token prediction as a policy gradient with shaped rewards (arXiv 2512.22955).

    With p the probability of the target x, minimises
    `-(sg((1-p)^beta) log p + lambda_top P(top) + lambda_tail P(tail))`, where top are the `top_k` most likely tokens
    without x, tail are all others without x, and sg is constant for the gradient. Of tokens that tie for the last
    place in top some are taken: all have the same probability, so values do not depend on which.
    """

    def __init__(self, beta: float, lambda_top: float = 0.0, lambda_tail: float = 0.0, top_k: int = 100) -> None:
        self.beta = beta
        self.lambda_top = lambda_top
        self.lambda_tail = lambda_tail
        self.top_k = top_k

    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for token ids (C,)."""
        # Tokens of the same reward need not be told apart.
        ranked = self.lambda_top != self.lambda_tail
        top = logits.topk(min(self.top_k, logits.shape[-1]), sorted=False).indices if ranked else None
        sums, losses, correct = exponentials(logits, targets)
        # 1 - p: the others' share has its digits where p rounds to 1. The target's own entry is put in by the gradient.
        doubt = logits.scatter_(-1, targets[:, None], 0).sum(-1) / sums.squeeze(-1)
        reward = (doubt.clamp(min=LEAST_DOUBT) if self.beta < 0 else doubt) ** self.beta
        top_mass = torch.zeros_like(doubt)
        if top is not None:
            probabilities = (logits.gather(-1, top) / sums).masked_fill_(top == targets[:, None], 0)
            top_mass = probabilities.sum(-1)
        shaped = self.lambda_top * top_mass + self.lambda_tail * (doubt - top_mass)

        def gradient(weights: Tensor) -> Tensor:
            # d P(S) / d z_j = p_j (1[j in S] - P(S)), summed up for x, top and tail.
            logits.mul_((weights * (reward + shaped - self.lambda_tail))[:, None] / sums)
            if top is not None:
                difference = self.lambda_tail - self.lambda_top
                logits.scatter_add_(-1, top, probabilities * (difference * weights)[:, None])
            own = weights * (torch.exp(-losses) * shaped - reward * doubt)
            return logits.scatter_(-1, targets[:, None], own[:, None])

        return ChunkLosses(reward * losses - shaped, losses, correct, gradient)


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of `config`."""
    if config.kind == "cross_entropy":
        return CrossEntropy()
    beta = BEST_BETA if config.beta is None else config.beta
    return DiversityOrPrecision(beta, config.lambda_top, config.lambda_tail, config.top_k or 100)


def exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make exponentials of logits (C, V), in place; their sums (C, 1), and losses (C,) and hits (C,) of the targets."""
    maxima = logits.amax(-1, keepdim=True)
    target_logits = logits.gather(-1, targets[:, None])
    sums = logits.sub_(maxima).exp_().sum(-1, keepdim=True)
    losses = sums.log() + (maxima - target_logits)
    return sums, losses.squeeze(-1), (target_logits >= maxima).squeeze(-1)
