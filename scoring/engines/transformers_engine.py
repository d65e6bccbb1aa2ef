"""Token losses by plain Hugging Face transformers: runs everywhere, and is what other engines are tested by.

Every sequence is computed from its start in one forward pass of the model's own code. Padding is on the right, where
causal attention keeps it from reaching the tokens of the sequence.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from schemas.manifest import Quantity
from scoring.engines import EngineConfig, Request

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
        self.model = loaded.to(self.device).eval()

    @torch.inference_mode()
    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        results = [request.missing() for request in requests]
        for rows in batches([len(request.input_ids) for request in requests], self.batch_tokens):
            batch = self._score_batch([requests[row] for row in rows])
            for place, row in enumerate(rows):
                request, end = requests[row], len(requests[row].input_ids)
                for line, quantity in enumerate(request.quantities):
                    results[row][line] = batch[quantity][place, request.first_scored : end]
                self.computed_tokens += end
        return results

    def _score_batch(self, requests: list[Request]) -> dict[Quantity, np.ndarray]:
        """Scores of a padded batch, each float32 [requests, longest]; entries beyond an end mean nothing."""
        quantities: set[Quantity] = {"loss", *(quantity for request in requests for quantity in request.quantities)}
        shape = len(requests), max(len(request.input_ids) for request in requests)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        for row, request in enumerate(requests):
            input_ids[row, : len(request.input_ids)] = torch.from_numpy(request.input_ids.astype(np.int64))
        scores = {quantity: torch.full(shape, torch.nan) for quantity in quantities}
        if shape[1] > 1:
            input_ids = input_ids.to(self.device)
            logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = input_ids[:, 1:].flatten()
            chunks = list(zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True))
            losses = [F.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in chunks]
            scores["loss"][:, 1:] = torch.cat(losses).view(shape[0], -1).cpu()
            if "entropy" in quantities:
                of_chunks = [entropies(rows.float()) for rows, _ in chunks]
                scores["entropy"][:, 1:] = torch.cat(of_chunks).view(shape[0], -1).cpu()
        return {quantity: of_quantity.numpy() for quantity, of_quantity in scores.items()}


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the distribution that each row of float32 logits [rows, vocabulary] gives; float32 [rows]."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


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
