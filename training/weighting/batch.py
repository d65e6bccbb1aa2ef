"""Weights that are known only when the batch is: ranked within it, or by what the model in training loses.

Weights by batch are made on the CPU, of the rows of the whole optimizer step. Live ones are made in the forward pass of
a device, for every head by itself: a loss several tokens ahead is larger than the stored loss of the next token, so a
threshold shared by the heads would leave the near ones out. No second model: the step computes the live loss anyway.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from schemas.configs import WeightsConfig
from schemas.formulas import LIVE, Node, is_live, mean_of, waits_for_batch
from training.losses import WeighLive
from training.packing import Rows
from training.weighting.controls import Control, apply_control
from training.weighting.expressions import Tokens, evaluate
from training.weighting.segments import ArraySegments, TensorSegments
from training.weighting.stored import replaced, split


@dataclass(frozen=True)
class BatchWeighting:
    """What is left to do to the weights of a batch when its rows are there.

    Attributes:
        rest: what weights are made of the loader's parts by, None where it hands on weights.
        live: whether that takes the losses of the model in training.
        mean: what live weights average to over the targets of a batch that have a score, 1 where it is not known.
        control: what is made of the weights then.
    """

    rest: Node | None
    live: bool
    mean: float
    control: Control

    @classmethod
    def make(cls, config: WeightsConfig, stand_in: str | None = None) -> "BatchWeighting":
        """That of a scheme; `stand_in` as for `make_weighting`."""
        node = replaced(config.node, stand_in) if stand_in else config.node
        rest = split(node)[0] if waits_for_batch(node) else None
        mean = mean_of(node)
        return cls(rest, is_live(node), 1.0 if mean is None else mean, config.control)

    def of_rows(self, rows: Rows, share: float, rng: np.random.Generator) -> Rows:
        """The rows of an optimizer step with weights (B, L), unless these are live.

        Args:
            rows: as the loader made them.
            share: how far weights have moved from 1 to their own.
            rng: for the controls.
        """
        if self.live:
            return rows
        weights = self.of_parts(rows.weights, rows.position_ids, rng) if self.rest else rows.weights
        if share < 1:
            weights = 1 + np.float32(share) * (weights - 1)
        return rows._replace(weights=weights)

    def of_parts(self, parts: np.ndarray, position_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Weights (...) float32 of the tokens of a batch, for a scheme that waits for it but is not live.

        Args:
            parts: (..., parts) what the loader made of each token, NaN where it has no score.
            position_ids: (...) of the tokens in their documents.
            rng: for the controls.
        """
        assert self.rest is not None
        # The first token of a document is no target, and padding is documents of one token.
        scored = (position_ids > 0) & np.isfinite(parts).all(-1)
        documents = np.flatnonzero(position_ids.ravel() == 0)
        counts = np.add.reduceat(scored.ravel(), documents, dtype=np.int64)
        columns = {str(number): parts[..., number][scored] for number in range(parts.shape[-1])}
        segments = {"sequence": ArraySegments(counts), "batch": ArraySegments(counts.sum(keepdims=True))}
        weights = np.zeros(scored.shape, dtype=np.float32)
        weights[scored] = apply_control(self.control, evaluate(self.rest, Tokens(columns, segments)), counts, rng)
        return weights

    def sum_of(self, counted: float, share: float) -> float:
        """The sum of the weights of a step, from what `training.targets` counts: stored weights, or live targets."""
        return counted * (1 + share * (self.mean - 1)) if self.live else counted

    def live_weights(self, share: float, rng: np.random.Generator) -> "LiveWeighting | None":
        """What makes the weights of a step's forward passes of this process, None unless they are live."""
        return LiveWeighting(self.rest, self.control, share, rng) if self.live and self.rest else None


@dataclass(frozen=True)
class LiveWeighting:
    """Weights from current losses and the loader's parts.

    Attributes:
        rest: the formula, with the loader's parts as columns "0", "1", ...
        control: what is made of the weights then.
        share: how far weights have moved from 1 to their own.
        rng: for the controls.
    """

    rest: Node
    control: Control = "none"
    share: float = 1.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def of_batch(self, position_ids: Tensor) -> WeighLive:
        """What `training.losses` calls for each head of a batch with these position ids (B, T)."""
        documents = (position_ids.flatten() == 0).cumsum(0)
        return lambda losses, task: self(losses, task.weights.to(losses.dtype), documents[task.rows])

    def __call__(self, losses: Tensor, parts: Tensor, documents: Tensor) -> Tensor:
        """Weights (R,) from live losses (R,), the loader's parts (R, parts) and documents (R,), which ascend."""
        if not len(losses):
            return losses
        index = documents.unique_consecutive(return_inverse=True)[1]
        segments = {"sequence": TensorSegments(index), "batch": TensorSegments(torch.zeros_like(index))}
        columns = {LIVE: losses} | {str(number): part for number, part in enumerate(parts.unbind(-1))}
        weights = evaluate(self.rest, Tokens(columns, segments, library=torch))
        if self.control != "none":
            counts = segments["sequence"].counts.cpu().numpy()
            drawn = apply_control(self.control, weights.cpu().numpy(), counts, self.rng)
            weights = torch.from_numpy(drawn).to(weights)
        return 1 + self.share * (weights - 1) if self.share < 1 else weights
