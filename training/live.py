"""Weights from what the student loses now and a stored loss. No second model: the step computes the live loss anyway.

Losses are ranked within one forward pass of one device, and for every head by itself: a loss several tokens ahead is
larger than the stored loss of the next token, so a threshold shared by the heads would leave the near ones out. Weights
have mean 1 over the scored targets of that pass, so the denominator of the step is known before it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.configs import WeightsConfig
from training.losses import WeighLive


@dataclass(frozen=True)
class LiveWeighting:
    """A live scheme.

    `rho1` keeps the `fraction` of largest `live - stored` (arXiv 2404.07965, eq. 4); `sparse` and `dense` are arXiv
    2503.09202's kappa and lambda on `|stored - live|`, document by document.
    """

    config: WeightsConfig

    def of_batch(self, position_ids: Tensor) -> WeighLive:
        """What `training.losses` calls for each head of a batch with these position ids (B, T)."""
        documents = (position_ids.flatten() == 0).cumsum(0)
        return lambda losses, task: self(losses, task.weights.to(losses.dtype), documents[task.rows])

    def __call__(self, losses: Tensor, stored: Tensor, documents: Tensor) -> Tensor:
        """Weights (R,) from live losses (R,), stored losses (R,) and the document of each (R,), ascending."""
        if self.config.preset == "rho1":
            return keep_largest(losses - stored, self.config.fraction)
        distance = (stored - losses).abs()
        index = documents.unique_consecutive(return_inverse=True)[1]
        if self.config.preset == "dense":
            return self.config.lam + (1 - self.config.lam) * distance / mean_of_segments(distance, index)
        return sparse(distance, index, self.config.fraction)


def keep_largest(scores: Tensor, fraction: float) -> Tensor:
    """Equal weights of mean 1 for the `ceil(fraction * R)` largest of (R,) scores, else 0; of ties, the first."""
    kept = count_kept(len(scores), fraction)
    weights = torch.zeros_like(scores)
    if kept:
        weights[scores.sort(descending=True, stable=True).indices[:kept]] = len(scores) / kept
    return weights


def count_kept(total: int, fraction: float) -> int:
    """`ceil(fraction * total)`, undisturbed by rounding errors of the product."""
    return math.ceil(fraction * total - 1e-9)


def mean_of_segments(values: Tensor, index: Tensor) -> Tensor:
    """The mean of each segment at every one of its places (R,); 1 where that is 0."""
    size = int(index[-1]) + 1 if len(index) else 0
    sums = values.new_zeros(size).index_add_(0, index, values)
    means = sums / index.bincount(minlength=size).clamp(min=1)
    return torch.where(means > 0, means, 1)[index]


def sparse(distance: Tensor, index: Tensor, fraction: float) -> Tensor:
    """Keep the `ceil(fraction * n)` largest of the n distances in each segment, at equal weights of mean 1."""
    order = distance.sort(descending=True, stable=True).indices
    order = order[index[order].sort(stable=True).indices]
    counts = index.bincount()
    rank = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index]
    kept = (counts * fraction - 1e-9).ceil().clamp(min=1)
    weights = torch.zeros_like(distance)
    weights[order] = torch.where(rank < kept[index], (counts / kept)[index], 0).to(weights.dtype)
    return weights
