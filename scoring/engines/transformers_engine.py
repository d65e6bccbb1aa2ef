"""Token scores by plain Hugging Face transformers. Runs everywhere and serves as the reference in tests.

Each sequence takes one forward pass of the model's own code. Padding is on the right, masked by causal attention.

Gradients are computed with respect to the input embeddings only, with one backward pass per batch. The activations,
logits and float32 log-softmax of the batch stay in memory until then.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers.utils import logging

from weighted_mtp.schemas.pretrained import load_causal_lm
from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_MAX
from weighted_mtp.scoring.engines.base import EngineConfig, Request

LOSS_ROWS = 1024
"""Positions per chunk of the float32 log-softmax, which bounds its memory."""


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

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        results = [request.missing() for request in requests]
        for quantities, group in by_quantities(requests):
            for batch in batches([len(requests[index].input_ids) for index in group], self.batch_tokens):
                indices = [group[place] for place in batch]
                scores = self._score_batch([requests[index] for index in indices], quantities)
                for row, index in enumerate(indices):
                    request, end = requests[index], len(requests[index].input_ids)
                    for line, quantity in enumerate(request.quantities):
                        results[index][line] = scores[quantity][row, request.first_scored : end]
                    self.computed_tokens += end
        return results

    def _score_batch(self, requests: list[Request], quantities: frozenset[Quantity]) -> dict[Quantity, np.ndarray]:
        """Scores of a padded batch, each float32 [requests, longest]; entries of padding are meaningless."""
        shape = len(requests), max(len(request.input_ids) for request in requests)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        for row, request in enumerate(requests):
            input_ids[row, : len(request.input_ids)] = torch.from_numpy(request.input_ids.astype(np.int64))
        scores = {quantity: torch.full(shape, torch.nan) for quantity in quantities}
        if shape[1] > 1:
            for quantity, flat in self._measure(input_ids.to(self.device), requests, quantities).items():
                scores[quantity][:, 1:] = flat.view(shape[0], -1).cpu()
        return {quantity: rows.numpy() for quantity, rows in scores.items()}

    def _measure(
        self, input_ids: torch.Tensor, requests: list[Request], quantities: frozenset[Quantity]
    ) -> dict[Quantity, torch.Tensor]:
        """Quantities of all tokens except the first of each row of `input_ids` [requests, longest].

        Returns:
            A flat float32 tensor [requests * (longest - 1)] for each quantity.
        """
        gradient = "gradient" in quantities
        with torch.inference_mode(not gradient):
            embeddings = self.model.get_input_embeddings()(input_ids).requires_grad_() if gradient else None
            inputs = {"input_ids": input_ids} if embeddings is None else {"inputs_embeds": embeddings}
            logits = self.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)  # [positions, vocabulary]
            targets = input_ids[:, 1:].flatten()  # [positions]
            chunks = list(zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True))
            losses = torch.cat([F.cross_entropy(rows.float(), ids, reduction="none") for rows, ids in chunks])
            found: dict[Quantity, torch.Tensor] = {"loss": losses.detach()}
            if "entropy" in quantities:
                found["entropy"] = torch.cat([entropies(rows.detach().float()) for rows, _ in chunks])
            if embeddings is not None:
                positions = torch.arange(1, input_ids.shape[1])
                scored = [
                    (positions >= request.first_scored) & (positions < len(request.input_ids)) for request in requests
                ]
                total_loss = losses[torch.cat(scored).to(self.device)].sum()
                (gradients,) = torch.autograd.grad(total_loss, embeddings)  # [requests, longest, hidden size]
                found["gradient"] = gradients[:, 1:].float().norm(dim=-1).clamp(max=FLOAT16_MAX).flatten()
        return found


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


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length. A group padded to its longest row has at most `batch_tokens` tokens.

    A longer row forms its own group. The longest rows come first, to run out of memory immediately or never.
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
