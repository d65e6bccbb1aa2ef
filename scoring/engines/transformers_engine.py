"""Token losses by plain Hugging Face transformers: runs everywhere, and is what other engines are tested by.

Every sequence is computed from its start in one forward pass of the model's own code. Padding is on the right, where
causal attention keeps it from reaching the tokens of the sequence.

Gradients are those of the inputs alone: one backward pass for a batch, whose activations, logits and float32
log-softmax are in memory meanwhile.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.schemas.shard_set.value_counts import FLOAT16_MAX
from weighted_mtp.scoring.engines.base import EngineConfig, Request

LOSS_ROWS = 1024
"""Positions whose float32 log-softmax is in memory at once."""


class TransformersEngine:
    """An engine on `AutoModelForCausalLM`."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint."""
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        self.batch_tokens = config.batch_tokens
        self.computed_tokens = 0
        self.device = torch.device("cuda" if config.on_gpu else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        self.model = loaded.to(self.device).eval().requires_grad_(False)

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        results = [request.missing() for request in requests]
        for quantities, alike in by_quantities(requests):
            for some in batches([len(requests[row].input_ids) for row in alike], self.batch_tokens):
                rows = [alike[place] for place in some]
                batch = self._score_batch([requests[row] for row in rows], quantities)
                for place, row in enumerate(rows):
                    request, end = requests[row], len(requests[row].input_ids)
                    for line, quantity in enumerate(request.quantities):
                        results[row][line] = batch[quantity][place, request.first_scored : end]
                    self.computed_tokens += end
        return results

    def _score_batch(self, requests: list[Request], quantities: frozenset[Quantity]) -> dict[Quantity, np.ndarray]:
        """Scores of a padded batch, each float32 [requests, longest]; entries beyond an end mean nothing."""
        shape = len(requests), max(len(request.input_ids) for request in requests)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        for row, request in enumerate(requests):
            input_ids[row, : len(request.input_ids)] = torch.from_numpy(request.input_ids.astype(np.int64))
        scores = {quantity: torch.full(shape, torch.nan) for quantity in quantities}
        if shape[1] > 1:
            for quantity, of_tokens in self._measure(input_ids.to(self.device), requests, quantities).items():
                scores[quantity][:, 1:] = of_tokens.view(shape[0], -1).cpu()
        return {quantity: of_quantity.numpy() for quantity, of_quantity in scores.items()}

    def _measure(
        self, input_ids: torch.Tensor, requests: list[Request], quantities: frozenset[Quantity]
    ) -> dict[Quantity, torch.Tensor]:
        """The quantities of all tokens but the first of each row of `input_ids` [requests, longest], flat."""
        gradient = "gradient" in quantities
        with torch.inference_mode(not gradient):
            embeddings = self.model.get_input_embeddings()(input_ids).requires_grad_() if gradient else None
            text = {"input_ids": input_ids} if embeddings is None else {"inputs_embeds": embeddings}
            logits = self.model(**text, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = input_ids[:, 1:].flatten()
            chunks = list(zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True))
            losses = torch.cat([F.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in chunks])
            found: dict[Quantity, torch.Tensor] = {"loss": losses.detach()}
            if "entropy" in quantities:
                found["entropy"] = torch.cat([entropies(rows.detach().float()) for rows, _ in chunks])
            if embeddings is not None:
                positions = torch.arange(1, input_ids.shape[1])
                spans = [(positions >= of.first_scored) & (positions < len(of.input_ids)) for of in requests]
                (slopes,) = torch.autograd.grad(losses[torch.cat(spans).to(self.device)].sum(), embeddings)
                found["gradient"] = slopes[:, 1:].float().norm(dim=-1).clamp(max=FLOAT16_MAX).flatten()
        return found


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the distribution that each row of float32 logits [rows, vocabulary] gives; float32 [rows]."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def by_quantities(requests: list[Request]) -> list[tuple[frozenset[Quantity], list[int]]]:
    """The numbers of the requests for each set of quantities, losses among them.

    A batch computes for all of its requests what one of them wants. Those with gradients come first: they take the
    most memory.
    """
    alike: dict[frozenset[Quantity], list[int]] = {}
    for row, request in enumerate(requests):
        alike.setdefault(frozenset(("loss", *request.quantities)), []).append(row)
    return sorted(alike.items(), key=lambda item: "gradient" not in item[0])


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length so that a group padded to its longest row holds at most `batch_tokens` tokens.

    A row longer than that is a group of its own. The longest come first: what does not fit in memory fails at once.
    """
    group: list[int] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if group and longest * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        if not group:
            longest = lengths[row]
        group.append(row)
    if group:
        yield group
