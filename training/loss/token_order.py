"""Token order prediction: which tokens come next, the sooner the more (TOP, arXiv 2508.19228).

One more unembedding U of the trunk's final hidden states h learns to rank the vocabulary by how soon each token comes.
With `y[t, v] = W - d`, d the distance from the next token (d = 0) to the first occurrence of v from there on, and -inf
for tokens that do not come within W tokens of the same document, the loss of position t is
`-sum_v softmax(y[t])_v * log softmax(U h_t)_v`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp.training.loss.objectives import ChunkLosses, Objective, exponentials

REACH = 104
"""exp(-104) is 0 in float32, and the next token always has d = 0: no token this far ahead has a share."""


class TokenOrder(Objective):
    """The loss of token order prediction for rows of a batch; its targets are the places of the next tokens."""

    def __init__(self, input_ids: Tensor, position_ids: Tensor, window: int | None) -> None:
        """Find what the targets of all rows are made from.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, restarting at 0 in every document.
            window: W; None for the whole document.
        """
        self.tokens = input_ids.flatten()
        self.documents = (position_ids.flatten() == 0).cumsum(0)
        self.before = previous_occurrences(self.tokens, self.documents)
        self.ahead = torch.arange(min(window or REACH, REACH, input_ids.shape[1]), device=input_ids.device)

    def shares(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may come, and their shares in `softmax(y)`.

        Args:
            places: (C,) int64, where in the flattened batch the next tokens stand.

        Returns:
            Tokens (C, M) int64 and shares (C, M) float32, M at most 104. A share of 0 says nothing of its token, which
            came already or lies in another document.
        """
        seen = places[:, None] + self.ahead
        inside = seen < len(self.tokens)
        seen = torch.where(inside, seen, places[:, None])
        first = inside & (self.documents[seen] == self.documents[places, None]) & (self.before[seen] < places[:, None])
        closeness = torch.where(first, -self.ahead.float(), -torch.inf)
        return self.tokens[seen], closeness.softmax(-1)

    def __call__(self, logits: Tensor, targets: Tensor) -> ChunkLosses:
        """Losses of logits (C, V) for the places (C,) of the next tokens, which count as the most likely ones."""
        tokens, shares = self.shares(targets)
        shares = shares.to(logits.dtype)
        wanted = logits.gather(-1, tokens)
        sums, nearest, correct = exponentials(logits, self.tokens[targets])
        # Relative to the next token's, of which the loss is known, so that large logits cost no digits.
        losses = nearest + (shares * (wanted[:, :1] - wanted)).sum(-1)

        def gradient(weights: Tensor) -> Tensor:
            logits.mul_(weights[:, None] / sums)
            return logits.scatter_add_(-1, tokens, shares * -weights[:, None])

        return ChunkLosses(losses, losses, correct, gradient)


def previous_occurrences(tokens: Tensor, documents: Tensor) -> Tensor:
    """Where each token of (N,) stood last in its document (N,) before, int64 (N,); -1 where it did not."""
    keys = (documents << 32) + tokens
    ordered, places = keys.sort(stable=True)
    before = torch.full_like(places, -1)
    again = ordered[1:] == ordered[:-1]
    before[places[1:]] = torch.where(again, places[:-1], -1)
    return before


def make_order_head(trunk: Any, *, from_scratch: bool) -> nn.Linear:
    """The further unembedding (V, D): random for a new trunk, else a copy of the trunk's own.

    The next token is the one that the order wants most, so a trained trunk's own unembedding is close to what is
    wanted, and its hidden states are not torn about while a random one would learn to read them.
    """
    unembedding = trunk.get_output_embeddings().weight
    head = nn.Linear(unembedding.shape[1], unembedding.shape[0], bias=False)
    if from_scratch:
        trunk._init_weights(head)
    else:
        with torch.no_grad():
            head.weight.copy_(unembedding)
    return head
