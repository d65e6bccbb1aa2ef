"""The gradient score from its definition, by autograd."""

import numpy as np
import torch
from torch.nn import functional as F


def plain_gradient(model: torch.nn.Module, ids: list[int], first: int) -> np.ndarray:
    """Norms of the gradient of the summed losses from position `first` on, with respect to all input embeddings."""
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0]
    F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="sum").backward()
    return embeddings.grad[0].norm(dim=-1).numpy()
