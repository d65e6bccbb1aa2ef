"""Training objectives: the loss of a chunk of logits, with its gradient in closed form.

An objective receives each chunk of logits once, in float32 or float64, and may overwrite it.
`training.loss.chunked_loss` keeps one chunk in memory and computes the gradient of the logits in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from weighted_mtp.schemas.configs import ObjectiveConfig

DEFAULT_BETA = -0.25
"""Best exponent for later reinforcement learning in arXiv 2512.22955."""

MIN_COMPLEMENT = torch.finfo(torch.float32).eps
"""Lower bound of 1 - p before raising it to a negative power. Below it, p is 1 in float32 and the loss is 0."""


class ChunkLosses(NamedTuple):
    """Losses of a chunk of C rows of logits.

    Attributes:
        objective_losses: (C,) the values to minimise, nats.
        token_losses: (C,) the losses to log and to rank, nats.
        correct: (C,) bool, whether the target is the most likely token.
        gradient: maps weights (C,) to the gradient (C, V) of the weighted sum of `objective_losses` with respect to the
            logits. Overwrites the logits, so call it only once.
    """

    objective_losses: Tensor
    token_losses: Tensor
    correct: Tensor
    gradient: Callable[[Tensor], Tensor]


class Objective(ABC):
    """The loss of each row."""

    @abstractmethod
    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for targets (C,) int64; overwrites the logits."""


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

    Minimises `-(sg((1-p)^beta) log p + lambda_top P(top) + lambda_tail P(tail))`, with p the probability of the target
    x, top the `top_k` most likely tokens without x, tail all other tokens without x, and sg the stop-gradient. Ties for
    the last place in top are broken arbitrarily; tied tokens have the same probability, so the loss is the same.
    """

    def __init__(self, beta: float, lambda_top: float = 0.0, lambda_tail: float = 0.0, top_k: int = 100) -> None:
        self.beta = beta
        self.lambda_top = lambda_top
        self.lambda_tail = lambda_tail
        self.top_k = top_k

    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for token ids (C,)."""
        # With equal rewards, top and tail need no ranking.
        ranked = self.lambda_top != self.lambda_tail
        top = logits.topk(min(self.top_k, logits.shape[-1]), sorted=False).indices if ranked else None
        sums, losses, correct = exponentials(logits, targets)
        # 1 - p, summed over the other tokens: exact where p rounds to 1. `gradient` fills in the target's entry.
        complement = logits.scatter_(-1, targets[:, None], 0).sum(-1) / sums.squeeze(-1)
        reward = (complement.clamp(min=MIN_COMPLEMENT) if self.beta < 0 else complement) ** self.beta
        top_mass = torch.zeros_like(complement)
        if top is not None:
            probabilities = (logits.gather(-1, top) / sums).masked_fill_(top == targets[:, None], 0)
            top_mass = probabilities.sum(-1)
        shaped = self.lambda_top * top_mass + self.lambda_tail * (complement - top_mass)

        def gradient(weights: Tensor) -> Tensor:
            # d P(S) / d z_j = p_j (1[j in S] - P(S)), summed over S = {x}, top and tail.
            logits.mul_((weights * (reward + shaped - self.lambda_tail))[:, None] / sums)
            if top is not None:
                difference = self.lambda_tail - self.lambda_top
                logits.scatter_add_(-1, top, probabilities * (difference * weights)[:, None])
            own = weights * (torch.exp(-losses) * shaped - reward * complement)
            return logits.scatter_(-1, targets[:, None], own[:, None])

        return ChunkLosses(reward * losses - shaped, losses, correct, gradient)


def make_objective(config: ObjectiveConfig) -> Objective:
    """Build the objective for `config`."""
    if config.kind == "cross_entropy":
        return CrossEntropy()
    beta = DEFAULT_BETA if config.beta is None else config.beta
    return DiversityOrPrecision(beta, config.lambda_top, config.lambda_tail, config.top_k or 100)


def exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the row maxima from logits (C, V) and exponentiate, in place.

    Returns:
        Row sums (C, 1) of the exponentials, negative log-likelihoods (C,) of the targets, and whether each target has
        the largest logit (C,) bool.
    """
    maxima = logits.amax(-1, keepdim=True)
    target_logits = logits.gather(-1, targets[:, None])
    sums = logits.sub_(maxima).exp_().sum(-1, keepdim=True)
    losses = sums.log() + (maxima - target_logits)
    return sums, losses.squeeze(-1), (target_logits >= maxima).squeeze(-1)
