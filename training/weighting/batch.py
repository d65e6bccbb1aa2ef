"""Weights that need the whole batch: ranked within it, or computed from the losses of the model in training.

Weights by batch are computed on the CPU from the rows of the whole optimizer step. Live weights are computed in the
forward pass of each device, for every head separately: losses several tokens ahead are larger than stored losses of the
next token, so a threshold shared by all heads would exclude the near ones. The step computes the live loss anyway, so
there is no second model.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.weights.analysis import mean_of
from weighted_mtp.schemas.weights.nodes import LIVE, Call, ColumnRef, Node, replace_column, waits_for_batch, walk_nodes
from weighted_mtp.schemas.weights.stages import StagedFormula
from weighted_mtp.training.loss.multi_head import LiveWeightFunction
from weighted_mtp.training.rows import Rows, silent_documents
from weighted_mtp.training.weighting.controls import Control, apply_control
from weighted_mtp.training.weighting.expressions import Tokens, evaluate_expression
from weighted_mtp.training.weighting.segments import ArraySegments, TensorSegments


@dataclass(frozen=True)
class BatchWeighting:
    """The part of a weighting scheme that is applied to a whole batch.

    Attributes:
        formula: the staged formula, None if the loader already computes the weights.
        mean: mean of live weights over the scored targets of every batch, 1 if unknown.
        control: control applied to weights that wait for the batch.
    """

    formula: StagedFormula | None
    mean: float
    control: Control

    @classmethod
    def make(cls, config: WeightsConfig, live_column: str | None = None) -> "BatchWeighting":
        """For the scheme of `config`; `live_column` as in `make_weighting`."""
        node = replace_column(config.node, LIVE, live_column) if live_column else config.node
        mean = mean_of(node)
        formula = StagedFormula.split(node) if waits_for_batch(node) else None
        return cls(formula, 1.0 if mean is None else mean, config.control)

    @property
    def live(self) -> bool:
        """Whether weights depend on the losses of the model in training."""
        return self.formula is not None and self.formula.live is not None

    def weigh_rows(self, rows: Rows, share: float, rng: np.random.Generator) -> Rows:
        """The rows of an optimizer step with weights (B, L), or with the components (B, L, components) of live ones.

        Args:
            rows: from the loader.
            share: warm-up factor, 0 (all weights 1) to 1 (the weights of the scheme).
            rng: for the controls.
        """
        if self.formula is None:
            weights = 1 + np.float32(share) * (rows.weights - 1) if share < 1 else rows.weights
            return rows._replace(weights=np.nan_to_num(weights))
        if self.live:
            return rows._replace(weights=self._live_components(rows, self.formula))
        weights = self.weigh_tokens(rows.weights, rows.position_ids, rng, share)
        return rows._replace(weights=weights, silent=silent_documents(weights != 0, rows.position_ids))

    def weigh_tokens(
        self, components: np.ndarray, position_ids: np.ndarray, rng: np.random.Generator, share: float = 1.0
    ) -> np.ndarray:
        """Weights (...) float32 of the tokens of a batch, for a scheme that waits for it but is not live.

        Args:
            components: (..., components) from the loader, NaN for a token without a score.
            position_ids: (...) position of each token in its document.
            rng: for the controls.
            share: warm-up factor, 0 to 1.
        """
        assert self.formula is not None
        tokens, scored = _scored_tokens(components, position_ids)
        own = evaluate_expression(self.formula.batch[0], tokens)
        own = apply_control(self.control, own, tokens.segments["sequence"].counts, rng)
        weights = np.zeros(scored.shape, dtype=np.float32)
        weights[scored] = 1 + np.float32(share) * (own - 1) if share < 1 else own
        return weights

    def _live_components(self, rows: Rows, formula: StagedFormula) -> np.ndarray:
        if formula.batch == tuple(ColumnRef(str(number)) for number in range(rows.weights.shape[-1])):
            return rows.weights
        tokens, scored = _scored_tokens(rows.weights, rows.position_ids)
        components = np.full((*scored.shape, len(formula.batch)), np.nan, dtype=np.float32)
        for number, component in enumerate(formula.batch):
            components[scored, number] = evaluate_expression(component, tokens)
        return components

    def weight_sum(self, counted: float, share: float) -> float:
        """Sum of the weights of a step, from the result of `count_targets`: stored weights, or live targets."""
        return counted * (1 + share * (self.mean - 1)) if self.live else counted

    def live_weighting(self, share: float, rng: np.random.Generator) -> "LiveWeighting | None":
        """Computes the weights in the forward passes of a step in this process; None unless they are live."""
        if self.formula is None or self.formula.live is None:
            return None
        return LiveWeighting(self.formula.live, self.control, share, rng)


def _scored_tokens(components: np.ndarray, position_ids: np.ndarray) -> tuple[Tokens, np.ndarray]:
    """The targets of a batch that have all components, and which tokens they are (...) bool."""
    # The first token of a document is not a target, and padding is documents of one token.
    scored = (position_ids > 0) & np.isfinite(components).all(-1)
    documents = np.flatnonzero(position_ids.ravel() == 0)
    counts = np.add.reduceat(scored.ravel(), documents, dtype=np.int64)  # (documents,)
    columns = {str(number): components[..., number][scored] for number in range(components.shape[-1])}
    segments = {"sequence": ArraySegments(counts), "batch": ArraySegments(counts.sum(keepdims=True))}
    return Tokens(columns, segments), scored


@dataclass(frozen=True)
class LiveWeighting:
    """Computes weights from current losses and stored components.

    Attributes:
        formula: the live stage, with the stored components as columns "0", "1", ...
        control: control applied to the weights.
        share: warm-up factor, 0 to 1.
        rng: for the controls.
    """

    formula: Node
    control: Control = "none"
    share: float = 1.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def for_batch(self, position_ids: Tensor) -> LiveWeightFunction:
        """The function that `training.loss.multi_head` calls for each head of a batch with position ids (B, T)."""
        documents = (position_ids.flatten() == 0).cumsum(0)
        return lambda losses, task: self(losses, task.weights.to(losses.dtype), documents[task.rows])

    def __call__(self, token_losses: Tensor, components: Tensor, documents: Tensor) -> Tensor:
        """Weights (R,) from live losses (R,), stored components (R, components) and ascending document ids (R,)."""
        if not len(token_losses):
            return token_losses
        scopes = {inner.by for inner in walk_nodes(self.formula) if isinstance(inner, Call)}
        if self.control != "none":
            scopes.add("sequence")
        segments = {}
        if "batch" in scopes:
            segments["batch"] = TensorSegments(torch.zeros_like(documents))
        if "sequence" in scopes:
            segments["sequence"] = TensorSegments(documents.unique_consecutive(return_inverse=True)[1])
        columns = {LIVE: token_losses} | {str(number): values for number, values in enumerate(components.unbind(-1))}
        weights = evaluate_expression(self.formula, Tokens(columns, segments, library=torch))
        if self.control != "none":
            counts = segments["sequence"].counts.cpu().numpy()
            controlled = apply_control(self.control, weights.cpu().numpy(), counts, self.rng)
            weights = torch.from_numpy(controlled).to(weights)
        return 1 + self.share * (weights - 1) if self.share < 1 else weights
