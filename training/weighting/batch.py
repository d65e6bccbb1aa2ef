"""Weights that are known only when the batch is: ranked within it, or by what the model in training loses.

Weights by batch are made on the CPU, of the rows of the whole optimizer step. Live ones are made in the forward pass of
a device, for every head by itself: a loss several tokens ahead is larger than the stored loss of the next token, so a
threshold shared by the heads would leave the near ones out. No second model: the step computes the live loss anyway.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.weights.language import (
    LIVE,
    Call,
    Column,
    Node,
    Stages,
    mean_of,
    replaced,
    waits_for_batch,
    walk,
)
from weighted_mtp.training.loss.multi_head import LiveWeightFunction
from weighted_mtp.training.rows import Rows, silent_documents
from weighted_mtp.training.weighting.controls import Control, apply_control
from weighted_mtp.training.weighting.expressions import Tokens, evaluate
from weighted_mtp.training.weighting.segments import ArraySegments, TensorSegments


@dataclass(frozen=True)
class BatchWeighting:
    """What is left to do to the weights of a batch when its rows are there.

    Attributes:
        stages: what weights are made of when, None where the loader hands on weights.
        mean: what live weights average to over the targets of a batch that have a score, 1 where it is not known.
        control: what is made of the weights then.
    """

    stages: Stages | None
    mean: float
    control: Control

    @classmethod
    def make(cls, config: WeightsConfig, stand_in: str | None = None) -> "BatchWeighting":
        """That of a scheme; `stand_in` as for `make_weighting`."""
        node = replaced(config.node, LIVE, stand_in) if stand_in else config.node
        mean = mean_of(node)
        return cls(Stages.of(node) if waits_for_batch(node) else None, 1.0 if mean is None else mean, config.control)

    @property
    def live(self) -> bool:
        """Whether weights take the losses of the model in training."""
        return self.stages is not None and self.stages.live is not None

    def of_rows(self, rows: Rows, share: float, rng: np.random.Generator) -> Rows:
        """The rows of an optimizer step with weights (B, L), or with the parts (B, L, parts) of live ones.

        Args:
            rows: as the loader made them.
            share: how far weights have moved from 1 to their own.
            rng: for the controls.
        """
        if self.stages is None:
            weights = 1 + np.float32(share) * (rows.weights - 1) if share < 1 else rows.weights
            return rows._replace(weights=np.nan_to_num(weights))
        if self.live:
            return rows._replace(weights=self._parts_of_live(rows))
        weights = self.of_parts(rows.weights, rows.position_ids, rng, share)
        return rows._replace(weights=weights, silent=silent_documents(weights != 0, rows.position_ids))

    def of_parts(
        self, parts: np.ndarray, position_ids: np.ndarray, rng: np.random.Generator, share: float = 1.0
    ) -> np.ndarray:
        """Weights (...) float32 of the tokens of a batch, for a scheme that waits for it but is not live.

        Args:
            parts: (..., parts) what the loader made of each token, NaN where it has no score.
            position_ids: (...) of the tokens in their documents.
            rng: for the controls.
            share: how far weights have moved from 1 to their own.
        """
        assert self.stages is not None
        tokens, scored = _scored(parts, position_ids)
        own = evaluate(self.stages.batch[0], tokens)
        own = apply_control(self.control, own, tokens.segments["sequence"].counts, rng)
        weights = np.zeros(scored.shape, dtype=np.float32)
        weights[scored] = 1 + np.float32(share) * (own - 1) if share < 1 else own
        return weights

    def _parts_of_live(self, rows: Rows) -> np.ndarray:
        assert self.stages is not None
        if self.stages.batch == tuple(Column(str(number)) for number in range(rows.weights.shape[-1])):
            return rows.weights
        tokens, scored = _scored(rows.weights, rows.position_ids)
        parts = np.full((*scored.shape, len(self.stages.batch)), np.nan, dtype=np.float32)
        for number, part in enumerate(self.stages.batch):
            parts[scored, number] = evaluate(part, tokens)
        return parts

    def sum_of(self, counted: float, share: float) -> float:
        """Sum of the weights of a step, from what `count_targets` counts: stored weights, or live targets."""
        return counted * (1 + share * (self.mean - 1)) if self.live else counted

    def live_weights(self, share: float, rng: np.random.Generator) -> "LiveWeighting | None":
        """What makes the weights of a step's forward passes of this process, None unless they are live."""
        if self.stages is None or self.stages.live is None:
            return None
        return LiveWeighting(self.stages.live, self.control, share, rng)


def _scored(parts: np.ndarray, position_ids: np.ndarray) -> tuple[Tokens, np.ndarray]:
    """The targets of a batch that have all parts, and which they are (...) bool."""
    # The first token of a document is no target, and padding is documents of one token.
    scored = (position_ids > 0) & np.isfinite(parts).all(-1)
    documents = np.flatnonzero(position_ids.ravel() == 0)
    counts = np.add.reduceat(scored.ravel(), documents, dtype=np.int64)
    columns = {str(number): parts[..., number][scored] for number in range(parts.shape[-1])}
    segments = {"sequence": ArraySegments(counts), "batch": ArraySegments(counts.sum(keepdims=True))}
    return Tokens(columns, segments), scored


@dataclass(frozen=True)
class LiveWeighting:
    """Weights from current losses and what is known before.

    Attributes:
        rest: the formula, with what is known before as columns "0", "1", ...
        control: what is made of the weights then.
        share: how far weights have moved from 1 to their own.
        rng: for the controls.
    """

    rest: Node
    control: Control = "none"
    share: float = 1.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def of_batch(self, position_ids: Tensor) -> LiveWeightFunction:
        """What `training.loss.multi_head` calls for each head of a batch with these position ids (B, T)."""
        documents = (position_ids.flatten() == 0).cumsum(0)
        return lambda losses, task: self(losses, task.weights.to(losses.dtype), documents[task.rows])

    def __call__(self, losses: Tensor, parts: Tensor, documents: Tensor) -> Tensor:
        """Weights (R,) from live losses (R,), what is known before (R, parts) and documents (R,), which ascend."""
        if not len(losses):
            return losses
        scopes = {inner.by for inner in walk(self.rest) if isinstance(inner, Call)}
        if self.control != "none":
            scopes.add("sequence")
        segments = {}
        if "batch" in scopes:
            segments["batch"] = TensorSegments(torch.zeros_like(documents))
        if "sequence" in scopes:
            segments["sequence"] = TensorSegments(documents.unique_consecutive(return_inverse=True)[1])
        columns = {LIVE: losses} | {str(number): part for number, part in enumerate(parts.unbind(-1))}
        weights = evaluate(self.rest, Tokens(columns, segments, library=torch))
        if self.control != "none":
            counts = segments["sequence"].counts.cpu().numpy()
            drawn = apply_control(self.control, weights.cpu().numpy(), counts, self.rng)
            weights = torch.from_numpy(drawn).to(weights)
        return 1 + self.share * (weights - 1) if self.share < 1 else weights
