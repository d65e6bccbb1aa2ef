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

from schemas.errors import UserError
from scoring.engines import EngineConfig

LOSS_ROWS = 1024
"""Positions whose float32 log-softmax is in memory at once."""


class TransformersEngine:
    """An engine on `AutoModelForCausalLM`."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Load the checkpoint.

        Raises:
            UserError: the checkpoint lacks weights that its architecture has.
        """
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        self.batch_tokens = config.batch_tokens
        self.device = torch.device("cuda" if config.gpu_share else "cpu")
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{model}: checkpoint lacks {missing[0]}; give one with all weights of a causal LM")
        self.model = loaded.to(self.device).eval()

    @torch.inference_mode()
    def token_losses(self, sequences: list[np.ndarray], first_scored: list[int]) -> list[np.ndarray]:
        """See `Engine.token_losses`."""
        losses: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for rows in batches([len(ids) for ids in sequences], self.batch_tokens):
            batch = self._batch_losses([sequences[row] for row in rows])
            for row, row_losses in zip(rows, batch, strict=True):
                losses[row] = row_losses[first_scored[row] : len(sequences[row])]
        return losses

    def _batch_losses(self, sequences: list[np.ndarray]) -> np.ndarray:
        """Losses of a padded batch, float32 [sequences, longest]; entries beyond a sequence's end mean nothing."""
        shape = len(sequences), max(map(len, sequences))
        input_ids = torch.zeros(shape, dtype=torch.int64)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        losses = torch.full(shape, torch.nan, dtype=torch.float32)
        if shape[1] > 1:
            input_ids = input_ids.to(self.device)
            logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = input_ids[:, 1:].flatten()
            chunks = [
                F.cross_entropy(rows.float(), wanted, reduction="none")
                for rows, wanted in zip(logits.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
            ]
            losses[:, 1:] = torch.cat(chunks).view(shape[0], -1).cpu()
        return losses.numpy()


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
