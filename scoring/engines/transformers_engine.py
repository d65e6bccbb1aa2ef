"""Token scores by plain Hugging Face transformers. Runs everywhere and serves as the reference in tests.

Each sequence takes one forward pass of the model's own code. Padding is on the right, masked by causal attention.

Logits exist for a bounded number of positions at once, if the model's logits depend on its final hidden states alone.
Gradients are computed with respect to the input embeddings only, with one backward pass per batch. The activations of
the batch stay in memory until then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.utils import logging

from weighted_mtp.schemas.pretrained import load_causal_lm, short_length
from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_MAX
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.engines.logits import rows_of_logits, separate_logits

UNPADDED_TOKENS = 512
"""Size up to which a batch may have any padding. Two batches would take longer."""
PADDING = 0.05
"""Largest share of padding in larger batches."""


class TransformersEngine:
    """An engine on `AutoModelForCausalLM`."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint."""
        logging.set_verbosity_error()
        torch.set_num_threads(config.threads)
        self.batch_tokens = config.batch_tokens
        self.computed_tokens = 0
        self.device = torch.device("cuda" if config.on_gpu else "cpu")
        dtype = getattr(torch, config.dtype)
        loaded = load_causal_lm(str(model), model, dtype=dtype, trust_remote_code=config.trust_remote_code)
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self.logits_of = separate_logits(self.model)
        self.vocab_size = self.model.config.get_text_config().vocab_size
        self.short_length = short_length(self.model.config)

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        results = [request.missing() for request in requests]
        for quantities, group in by_quantities(requests):
            lengths = [len(requests[index].input_ids) for index in group]
            for batch in batches(lengths, self.batch_tokens, self.short_length):
                indices = [group[place] for place in batch]
                scores = self._score_batch([requests[index] for index in indices], quantities)
                for row, index in enumerate(indices):
                    request, end = requests[index], len(requests[index].input_ids)
                    for line, quantity in enumerate(request.quantities):
                        results[index][line] = scores[quantity][row, request.first_scored : end]
                    self.computed_tokens += end
        return results

    def _score_batch(self, requests: list[Request], quantities: frozenset[Quantity]) -> dict[Quantity, np.ndarray]:
        """Scores of a padded batch, each float32 [requests, longest], NaN where none are requested."""
        shape = len(requests), max(len(request.input_ids) for request in requests)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        scored = torch.zeros(shape, dtype=torch.bool)
        for row, request in enumerate(requests):
            input_ids[row, : len(request.input_ids)] = torch.from_numpy(request.input_ids.astype(np.int64))
            scored[row, max(1, request.first_scored) : len(request.input_ids)] = True
        scores = {quantity: torch.full(shape, torch.nan) for quantity in quantities}
        if scored.any():
            found = self._measure(input_ids.to(self.device), scored.to(self.device), quantities)
            for quantity, values in found.items():
                scores[quantity][scored] = values.cpu()
        return {quantity: rows.numpy() for quantity, rows in scores.items()}

    def _measure(
        self, input_ids: torch.Tensor, scored: torch.Tensor, quantities: frozenset[Quantity]
    ) -> dict[Quantity, torch.Tensor]:
        """Quantities of the tokens of `input_ids` [requests, longest] that are `scored`, of the same shape.

        Returns:
            A float32 tensor [scored tokens] for each quantity.
        """
        gradient = "gradient" in quantities
        with torch.inference_mode(not gradient), recorded_embeddings(self.model) as embeddings:
            if self.logits_of:
                outputs = self.model.base_model(input_ids, use_cache=False).last_hidden_state
            else:
                outputs = self.model(input_ids, use_cache=False).logits
            # Position t predicts token t + 1. The hidden states or logits, [scored tokens, size]:
            states = outputs[:, :-1][scored[:, 1:]]
            leaf = states.detach().requires_grad_(gradient)
            targets = input_ids[scored]
            found: dict[Quantity, torch.Tensor] = {
                quantity: torch.empty(len(targets), device=self.device) for quantity in quantities - {"gradient"}
            }
            rows = rows_of_logits(states, self.vocab_size)
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = (self.logits_of(leaf[part]) if self.logits_of else leaf[part]).float()
                losses = F.cross_entropy(logits, targets[part], reduction="none")
                found["loss"][part] = losses.detach()
                if "entropy" in quantities:
                    found["entropy"][part] = entropies(logits.detach())
                if gradient:
                    losses.sum().backward()
            if gradient:
                (gradients,) = torch.autograd.grad(states, embeddings, leaf.grad)  # [requests, longest, hidden size]
                found["gradient"] = gradients[scored].float().norm(dim=-1).clamp(max=FLOAT16_MAX)
        return found


@contextmanager
def recorded_embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the input embeddings of a forward pass; outside of inference mode, they require gradients.

    The pass gets ids, because models may compute more than embeddings from them, such as the positions of RoBERTa.
    """
    found: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            return output
        found.append(output.requires_grad_())
        return output.clone()  # models may change them in place

    hook = model.get_input_embeddings().register_forward_hook(record)
    try:
        yield found
    finally:
        hook.remove()


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropies in nats, float32 [rows], of the distributions given by float32 logits [rows, vocabulary]."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def by_quantities(requests: list[Request]) -> list[tuple[frozenset[Quantity], list[int]]]:
    """Indices of the requests, grouped by their quantities. Every group includes the loss.

    Requests in one batch compute the same quantities. Groups with gradients come first because they need the most
    memory.
    """
    groups: dict[frozenset[Quantity], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(frozenset(("loss", *request.quantities)), []).append(index)
    return sorted(groups.items(), key=lambda item: "gradient" not in item[0])


def batches(lengths: list[int], batch_tokens: int, short_length: int | None = None) -> Iterator[list[int]]:
    """Group rows of similar length. A group padded to its longest row has at most `batch_tokens` tokens.

    A longer row forms its own group. The longest rows come first, to run out of memory immediately or never. A group
    ends where one more row would make the share of padding larger than `PADDING`, unless it is small. Rows of at most
    `short_length` tokens are not padded beyond it.
    """
    group: list[int] = []
    longest = tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padded = longest * (len(group) + 1)
        padding = padded - tokens - lengths[row]
        full = padded > batch_tokens or (padded > UNPADDED_TOKENS and padding > PADDING * padded)
        if group and (full or (short_length is not None and lengths[row] <= short_length < longest)):
            yield group
            group = []
        if not group:
            longest, tokens = lengths[row], 0
        group.append(row)
        tokens += lengths[row]
    if group:
        yield group
