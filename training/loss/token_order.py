"""Token order prediction: rank upcoming tokens by proximity (TOP, arXiv 2508.19228).

A second unembedding U of the trunk's final hidden states h learns to rank the vocabulary by how soon each token occurs.
Let d be the distance from the next token (d = 0) to the first occurrence of v at or after it. With `y[t, v] = W - d`,
and -inf for tokens that do not occur within W tokens of the same document, the loss of position t is
`-sum_v softmax(y[t])_v * log softmax(U h_t)_v`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp.training.loss.objectives import ChunkLosses, Objective, exponentials

MAX_DISTANCE = 104
"""At this distance target probabilities are 0: exp(-104) is 0 in float32, and the next token always has d = 0."""


class TokenOrder(Objective):
    """Loss of token order prediction for rows of one batch. Targets are positions of next tokens."""

    def __init__(self, input_ids: Tensor, position_ids: Tensor, window: int | None) -> None:
        """Index the tokens of a batch.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, restarting at 0 in every document.
            window: W; None means the rest of the document.
        """
        self.tokens = input_ids.flatten()
        self.documents = (position_ids.flatten() == 0).cumsum(0)
        self.previous = previous_occurrences(self.tokens, self.documents)
        distances = min(window or MAX_DISTANCE, MAX_DISTANCE, input_ids.shape[1])
        self.ahead = torch.arange(distances, device=input_ids.device)  # (M,)

    def target_probabilities(self, next_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Upcoming tokens and their probabilities `softmax(y)`.

        Args:
            next_positions: (C,) int64, positions of the next tokens in the flattened batch.

        Returns:
            Tokens (C, M) int64 and probabilities (C, M) float32, M at most 104. Entries of repeated tokens and of other
            documents have probability 0.
        """
        start = next_positions[:, None]  # (C, 1)
        upcoming = start + self.ahead  # (C, M)
        inside = upcoming < len(self.tokens)
        upcoming = torch.where(inside, upcoming, start)
        same_document = self.documents[upcoming] == self.documents[start]
        first_occurrence = inside & same_document & (self.previous[upcoming] < start)
        proximity = torch.where(first_occurrence, -self.ahead.float(), -torch.inf)
        return self.tokens[upcoming], proximity.softmax(-1)

    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for positions (C,) of the next tokens; correct where the next token ranks first."""
        tokens, probabilities = self.target_probabilities(targets)  # (C, M)
        probabilities = probabilities.to(logits.dtype)
        upcoming_logits = logits.gather(-1, tokens)
        sums, next_token_losses, correct = exponentials(logits, self.tokens[targets])
        # Subtract the next token's logit to keep the precision of large logits.
        losses = next_token_losses + (probabilities * (upcoming_logits[:, :1] - upcoming_logits)).sum(-1)

        def gradient(weights: Tensor) -> Tensor:
            logits.mul_(weights[:, None] / sums)
            return logits.scatter_add_(-1, tokens, probabilities * -weights[:, None])

        return ChunkLosses(losses, losses, correct, gradient)


def previous_occurrences(tokens: Tensor, documents: Tensor) -> Tensor:
    """Position (N,) int64 of the previous occurrence of each token (N,) in its document (N,), or -1."""
    keys = (documents << 32) + tokens
    ordered, positions = keys.sort(stable=True)
    previous = torch.full_like(positions, -1)
    repeated = ordered[1:] == ordered[:-1]
    previous[positions[1:]] = torch.where(repeated, positions[:-1], -1)
    return previous


def make_order_head(trunk: Any, *, from_scratch: bool) -> nn.Linear:
    """The second unembedding (V, D): random for a new trunk, else a copy of the trunk's own.

    The next token has the largest target, so the unembedding of a trained trunk is a good starting point. A random
    matrix would send large, noisy gradients into the trunk.
    """
    unembedding = trunk.get_output_embeddings().weight
    head = nn.Linear(unembedding.shape[1], unembedding.shape[0], bias=False)
    if from_scratch:
        trunk._init_weights(head)
    else:
        with torch.no_grad():
            head.weight.copy_(unembedding)
    return head
