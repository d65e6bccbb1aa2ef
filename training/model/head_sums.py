"""Sums over target tokens, for metrics and evaluation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HeadSums(NamedTuple):
    """Sums over targets of nonzero weight, for each of the P entries of `HeadsConfig.predictions`.

    All are (P,) of the same floating dtype, without gradients. Some functions accept additional leading dimensions.

    Attributes:
        weighted_loss: objective losses times weights.
        plain_loss: token losses, nats.
        selected: number of targets.
        correct: number of targets that are the most likely token.
        weight: absolute weights.
        squared_weight: squared weights.
    """

    weighted_loss: Tensor
    plain_loss: Tensor
    selected: Tensor
    correct: Tensor
    weight: Tensor
    squared_weight: Tensor

    @classmethod
    def zeros(cls, predictions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> "HeadSums":
        """Sums of zero."""
        return cls(*(torch.zeros(predictions, device=device, dtype=dtype) for _ in cls._fields))

    @classmethod
    def of_rows(cls, objective_losses: Tensor, token_losses: Tensor, correct: Tensor, weights: Tensor) -> "HeadSums":
        """Scalar sums over the rows (R,) of one prediction; ignores rows of weight 0."""
        selected = weights != 0
        return cls(
            weighted_loss=weights @ objective_losses,
            plain_loss=torch.where(selected, token_losses, 0).sum(),
            selected=selected.sum().to(weights.dtype),
            correct=(correct & selected).sum().to(weights.dtype),
            weight=weights.abs().sum(),
            squared_weight=weights @ weights,
        )

    @classmethod
    def of_documents(
        cls,
        objective_losses: Tensor,
        token_losses: Tensor,
        correct: Tensor,
        weights: Tensor,
        documents: Tensor,
        count: int,
    ) -> "HeadSums":
        """Sums (count,) float64 of the rows of each document; `documents` (R,) int64 is the document of each row."""
        selected = weights != 0
        plain = torch.where(selected, token_losses, 0)
        terms = (weights * objective_losses, plain, selected, correct & selected, weights.abs(), weights.square())
        values = torch.stack([term.double() for term in terms])  # (6, R)
        return cls(*values.new_zeros(len(terms), count).index_add_(1, documents, values))

    @classmethod
    def stack(cls, sums: "Sequence[HeadSums]") -> "HeadSums":
        """Stack every field along a new first dimension."""
        return cls(*map(torch.stack, zip(*sums, strict=True)))
