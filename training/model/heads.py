"""Heads for multi-token prediction: modules that map the trunk's output to hidden states for later tokens.

All heads share the trunk's unembedding, and offset 1 is the trunk's own prediction. A model without extra heads is
therefore an ordinary language model. Each kind of heads maps a `TrunkOutput` to `HeadGroup`s and reports its own FLOPs.
`training.loss.multi_head` runs and differentiates the groups one after another.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weighted_mtp.training.loss.multi_head import HeadGroup
from weighted_mtp.training.loss.shifted_targets import valid_targets
from weighted_mtp.training.model.trunk import LayerCall, attention_width, decoder_parts, make_layer


class TrunkOutput(NamedTuple):
    """Output of the trunk over packed rows: the input of the heads.

    Attributes:
        inputs: tensors (B, T, D) through which gradients reach the trunk: the final hidden states, then those in
            `Heads.reads`.
        position_ids: (B, T) int64.
        last_call: arguments of the trunk's last layer.
    """

    inputs: tuple[Tensor, ...]
    position_ids: Tensor
    last_call: LayerCall


class HeadFlops(NamedTuple):
    """FLOPs of all extra heads in forward and backward passes, with trainable matrices.

    Attributes:
        token: per token of the rows.
        pair: per (query, key) pair of attention.
        row: per selected row of one extra head.
    """

    token: float = 0.0
    pair: float = 0.0
    row: float = 0.0


class Heads(nn.ModuleList, ABC):
    """The modules for all offsets after the first; head number k of a model is module k - 1."""

    reads: Sequence[str] = ()
    """Trunk tensors to read besides the final hidden states: `last_layer_input`, `before_norm`, `embeddings`."""

    @abstractmethod
    def groups(self, trunk: TrunkOutput) -> list[HeadGroup]:
        """Groups that compute the hidden states of heads 1, 2, ..."""

    @abstractmethod
    def flops(self, config: Any) -> HeadFlops:
        """FLOPs of the heads for a trunk with this Hugging Face config."""

    def matrix_flops(self) -> float:
        """FLOPs per row of all matrix products in all heads: two each for the output and the two gradients."""
        return 6.0 * sum(p.numel() for p in self.parameters() if p.ndim == 2)


class ResidualHead(nn.Module):
    """`x + SiLU(W x)` on the trunk's output, with W initially 0 (Medusa, arXiv 2401.10774, section 2.1.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., D) to (..., D); rows are independent."""
        return hidden_states + nn.functional.silu(self.linear(hidden_states))


class ResidualHeads(Heads):
    """Parallel heads, each with one residual block."""

    def __init__(self, trunk: Any, offsets: Sequence[int]) -> None:
        super().__init__(ResidualHead(trunk.config.get_text_config().hidden_size) for _ in offsets[1:])

    def groups(self, trunk: TrunkOutput) -> list[HeadGroup]:
        """One group for each head, over rows of nonzero weight only."""
        return [self._group(i, head) for i, head in enumerate(self, start=1)]

    def flops(self, config: Any) -> HeadFlops:
        """FLOPs per selected row only."""
        return HeadFlops(row=self.matrix_flops() / max(1, len(self)))

    @staticmethod
    def _group(number: int, head: nn.Module) -> HeadGroup:
        def hidden_states(inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
            return [head(inputs[0].flatten(0, 1)[rows[0]])]

        return HeadGroup([number], hidden_states, tuple(head.parameters()))


class DecoderHeads(Heads):
    """Parallel heads, each with one decoder layer on the input of the trunk's last layer (arXiv 2404.19737)."""

    reads = ("last_layer_input",)

    def __init__(self, trunk: Any, offsets: Sequence[int], *, from_scratch: bool) -> None:
        super().__init__(make_layer(trunk, from_scratch=from_scratch) for _ in offsets[1:])
        _, norm = decoder_parts(trunk)
        self.final_norm = [norm]  # the trunk's own; a list keeps it from becoming a submodule of the heads

    def groups(self, trunk: TrunkOutput) -> list[HeadGroup]:
        """One group for each head, over all positions, because attention needs them."""
        return [self._group(i, layer, trunk.last_call) for i, layer in enumerate(self, start=1)]

    def flops(self, config: Any) -> HeadFlops:
        """FLOPs of decoder layers over all tokens."""
        return HeadFlops(token=self.matrix_flops(), pair=12.0 * len(self) * attention_width(config))

    def _group(self, number: int, layer: nn.Module, call: LayerCall) -> HeadGroup:
        [norm] = self.final_norm

        def hidden_states(inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
            return [norm(call.run(layer, inputs[1]).flatten(0, 1)[rows[0]])]

        return HeadGroup([number], hidden_states, (*layer.parameters(), *norm.parameters()))


class SequentialModule(nn.Module):
    """One decoder layer on `M [norm(h); norm(emb)]`, then its own final norm (DeepSeek-V3, arXiv 2412.19437).

    Names and the order of concatenation follow MiMo (arXiv 2505.07608), which vLLM serves. The half of M for h starts
    as the identity; the half for the embedding is random.
    """

    def __init__(self, trunk: Any, *, from_scratch: bool) -> None:
        super().__init__()
        _, norm = decoder_parts(trunk)
        size = trunk.config.get_text_config().hidden_size
        self.hidden_layernorm, self.token_layernorm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        for module in (self.hidden_layernorm, self.token_layernorm, self.input_proj):
            trunk._init_weights(module)
        with torch.no_grad():
            self.input_proj.weight[:, :size] = torch.eye(size)
        self.mtp_block = make_layer(trunk, from_scratch=from_scratch)
        self.final_layernorm = copy.deepcopy(norm)

    def forward(self, hidden_states: Tensor, embeddings: Tensor, call: LayerCall) -> Tensor:
        """Map hidden states (B, T, D) of the previous module and embeddings (B, T, D) to hidden states (B, T, D)."""
        pair = torch.cat([self.hidden_layernorm(hidden_states), self.token_layernorm(embeddings)], dim=-1)
        return call.run(self.mtp_block, self.input_proj(pair))


class SequentialHeads(Heads):
    """A chain of modules. Each reads the previous module's hidden states and the embedding of that module's target.

    The first reads the trunk's hidden states before the final norm. Embeddings are zero at position 0 of each document,
    as in vLLM's MiMo, and where the token would lie beyond the document.
    """

    reads = ("before_norm", "embeddings")

    def __init__(self, trunk: Any, offsets: Sequence[int], *, from_scratch: bool) -> None:
        super().__init__(SequentialModule(trunk, from_scratch=from_scratch) for _ in offsets[1:])
        self.offsets = tuple(offsets)

    def groups(self, trunk: TrunkOutput) -> list[HeadGroup]:
        """One group, because each module needs the previous one."""

        def hidden_states(inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
            _, states, embeddings = inputs
            selected = []
            modules: Sequence[Any] = list(self)
            for module, offset, index in zip(modules, self.offsets, rows, strict=False):
                ahead = shift_within(embeddings, trunk.position_ids, offset)  # (B, T, D)
                states = module(states, ahead, trunk.last_call)  # (B, T, D)
                selected.append(module.final_layernorm(states.flatten(0, 1)[index]))  # (R, D)
            return selected

        return [HeadGroup(range(1, len(self) + 1), hidden_states, tuple(self.parameters()))] if len(self) else []

    def flops(self, config: Any) -> HeadFlops:
        """FLOPs of decoder layers and input projections over all tokens."""
        return HeadFlops(token=self.matrix_flops(), pair=12.0 * len(self) * attention_width(config))


def shift_within(values: Tensor, position_ids: Tensor, offset: int) -> Tensor:
    """`values[:, t + offset]` (B, T, D); zero where t starts a document or t + offset lies outside its document."""
    inside = valid_targets(position_ids, offset) & (position_ids[:, :-offset] > 0)
    ahead = torch.where(inside[..., None], values[:, offset:], 0)
    return nn.functional.pad(ahead, (0, 0, 0, offset))


def make_heads(trunk: Any, kind: str, block: str, offsets: Sequence[int], *, from_scratch: bool) -> Heads:
    """Build heads of a kind and block (see `schemas.configs.HeadsConfig`) for a trunk.

    Raises:
        UserError: the trunk's architecture hides its layers.
    """
    if kind == "sequential":
        return SequentialHeads(trunk, offsets, from_scratch=from_scratch)
    if block == "decoder":
        return DecoderHeads(trunk, offsets, from_scratch=from_scratch)
    return ResidualHeads(trunk, offsets)
