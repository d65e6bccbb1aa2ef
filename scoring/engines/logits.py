"""Logits in chunks: how many rows at once, and the logits of a model of transformers apart from its layers."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

LOGITS_BYTES = 1 << 28
"""Float32 logits per chunk. Log-probabilities and other intermediates take up to three times as much in addition."""
CACHED_LOGITS_BYTES = 1 << 24
"""The same on a CPU in float32, where chunks that fit in the caches are fastest."""
MIN_ROWS = 256
"""Smallest chunk: with fewer rows, reading the weights dominates the matrix product."""
PROBE_TOKENS = 16
MIN_TOLERANCE = 1e-4
"""Difference of logits on the probe that counts as rounding; rounding of float32 products gives about 1e-6."""


def rows_of_logits(hidden_states: Tensor, vocab_size: int) -> int:
    """Rows of float32 logits to compute at once from these hidden states."""
    in_caches = hidden_states.dtype == torch.float32 and not hidden_states.is_cuda
    return max(MIN_ROWS, (CACHED_LOGITS_BYTES if in_caches else LOGITS_BYTES) // (4 * vocab_size))


@dataclass
class LayersOutput(ModelOutput):
    """Output of the layers of a model, with everything that models pass on beside their logits."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    cache_params: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None


class GivenStates(nn.Module):
    """Takes the place of the layers of a model, and returns the final hidden states that it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> LayersOutput:
        """Final hidden states [batch, positions, hidden size], in the form of an output of layers."""
        return LayersOutput(last_hidden_state=inputs_embeds)


class LogitsModel:
    """Logits of hidden states, computed by the model's own code, with its bias, scale and soft-cap.

    It is the model with its layers replaced, and shares the parameters of the head.
    """

    def __init__(self, model: Any) -> None:
        self.head = copy.copy(model)
        self.head._modules = model._modules | {model.base_model_prefix: GivenStates()}

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of final hidden states [rows, hidden size]."""
        logits: Tensor = self.head(inputs_embeds=hidden_states[None], use_cache=False).logits[0]
        return logits


def separate_logits(model: Any) -> LogitsModel | None:
    """The logits of a model as a function of its final hidden states; None if they need more.

    Models with code of their own may do anything; models of transformers are compared on a probe, with rows of two
    sequences in another order.
    """
    if model.base_model is model or not type(model).__module__.startswith("transformers."):
        return None
    logits_of = LogitsModel(model)
    ids = torch.arange(2 * PROBE_TOKENS, device=model.device).view(2, -1) % model.config.get_text_config().vocab_size
    rows = torch.arange(2 * PROBE_TOKENS - 1, 0, -3, device=model.device)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits.flatten(0, 1)[rows]
        try:
            found = logits_of(model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows])
        except Exception:  # whatever the code of a model raises if its layers are not its own
            return None
    return logits_of if found.shape == expected.shape and same_logits(found, expected) else None


def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Whether logits [rows, vocabulary] differ by rounding alone, relative to the spread of the expected ones.

    A matrix product rounds differently for another number of rows. The spread is a median, so ids that a model masks
    with -inf or the lowest number do not count.
    """
    rounding = 2 * torch.finfo(expected.dtype).eps
    found, expected = found.float(), expected.float()
    spread = (expected - expected.median(-1, keepdim=True).values).abs().median()
    allowed = max(MIN_TOLERANCE, rounding) * float(spread)
    # NaN of damaged weights is reported where losses are computed.
    return math.isfinite(allowed) and torch.allclose(found, expected, rtol=max(1e-5, rounding), atol=allowed)
