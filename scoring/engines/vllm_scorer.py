"""Token losses inside vLLM: what a causal language model of vLLM needs to return one or two numbers per token.

The model runs as vLLM's pooling models do. For every step of the engine the pooler gets the hidden states of all
scheduled tokens and reduces them at once, so logits exist for a bounded number of positions and nothing but the numbers
leaves the engine. Written for vLLM 0.24 to 0.32.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.v1.pool.metadata import PoolingMetadata

TASK = "token_classify"
LOGITS_BYTES = 1 << 28
"""Float32 logits in memory at once. Log-probabilities and the like come on top, up to three times as much."""
CACHED_LOGITS_BYTES = 1 << 24
"""The same on a CPU: what its caches hold is fastest, unless the whole head is converted to float32 for each chunk."""
LEAST_ROWS = 256
"""Fewer rows at once would leave the matrix product waiting for the weights."""


class TokenScorer(Pooler):
    """Reduces the hidden states of each request to the losses of its tokens, and their entropies where asked for.

    A request may carry in `PoolingParams.extra_kwargs`:
        first_scored: int, the first position whose loss is wanted; default 1.
        entropy: bool, whether the entropies of the predictions are wanted as well.

    Its result is a float32 tensor [1 or 2, tokens - first_scored]: losses in nats, then entropies in nats.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__()
        self.model = (model,)  # in a tuple, or the model would become a part of its own part
        self.vocab_size = vocab_size

    def get_supported_tasks(self) -> set[str]:
        """The task under which vLLM returns something for each token."""
        return {TASK}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        """Ask for the token ids of the prompts."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """Score the tokens whose prediction was computed in this step.

        Args:
            hidden_states: final hidden states of all tokens of the step, [tokens, hidden size].
            pooling_metadata: the requests of the step, in the order of their tokens.

        Returns:
            For each request its result if its prompt ends with this step, else None.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        rows, targets, sizes = [], [], []
        first_row = 0
        prompts = pooling_metadata.get_prompt_token_ids_cpu()
        options = [params.extra_kwargs or {} for params in pooling_metadata.pooling_params]
        for ids, count, end, option in zip(prompts, counts, ends, options, strict=True):
            start = end - count
            # Position t predicts token t + 1; the last one predicts nothing that is in the prompt.
            first = max(start, option.get("first_scored", 1) - 1)
            last = max(first, min(end, len(ids) - 1))
            rows.append(torch.arange(first, last) + (first_row - start))
            targets.append(ids[first + 1 : last + 1])
            sizes.append(last - first)
            first_row += count
        entropy = any(option.get("entropy") for option in options)
        scores = self.score(hidden_states, torch.cat(rows), torch.cat(targets).long(), entropy)

        results: list[torch.Tensor | None] = []
        finished = (cursor.prompt_lens_cpu == cursor.seq_lens_cpu).tolist()
        states = pooling_metadata.pooling_states
        parts = scores.split(sizes, dim=1)
        for state, part, count, end, done, option in zip(states, parts, counts, ends, finished, options, strict=True):
            if end == count:
                state.clean()  # a request that was preempted starts anew
            state.hidden_states_cache.append(part if option.get("entropy") else part[:1])
            results.append(torch.cat(state.hidden_states_cache, dim=1) if done else None)
            if done:
                state.clean()
        return results

    def score(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, entropy: bool
    ) -> torch.Tensor:
        """Losses of `targets` given the hidden states at `rows`, and entropies; float32 [1 or 2, rows]."""
        if hidden_states.is_cuda:  # a copy from memory that is not pinned would wait for the forward pass
            rows, targets = rows.pin_memory(), targets.pin_memory()
        rows = rows.to(hidden_states.device, non_blocking=True)
        targets = targets.to(hidden_states.device, non_blocking=True)
        scores = hidden_states.new_empty((1 + entropy, len(rows)), dtype=torch.float32)
        in_caches = hidden_states.dtype == torch.float32 and not hidden_states.is_cuda
        chunk = max(LEAST_ROWS, (CACHED_LOGITS_BYTES if in_caches else LOGITS_BYTES) // (4 * self.vocab_size))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            self.score_chunk(hidden_states[rows[part]], targets[part], scores[:, part])
        return scores

    def score_chunk(self, hidden_states: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor) -> None:
        """Write the losses of `targets` [rows], and entropies if there is room for them, to `scores` [1 or 2, rows]."""
        (model,) = self.model
        logits = model.compute_logits(hidden_states)
        if logits is None:  # tensor parallel: another rank has the logits, and its result is the one that counts
            return
        logits = logits.float()
        scores[0] = F.cross_entropy(logits, targets, reduction="none")
        if len(scores) > 1:
            scores[1] = torch.special.entr(logits.softmax(-1)).sum(-1)


class TokenScoringModel(nn.Module):
    """Mixed into a causal language model: float32 logits and a pooler that scores tokens."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.modules():
            # Quantised heads keep their own method.
            if isinstance(layer, VocabParallelEmbedding) and type(layer.quant_method) in (
                UnquantizedEmbeddingMethod,
                UnquantizedLinearMethod,
            ):
                layer.quant_method = Float32Head()
        self.pooler = TokenScorer(self, vllm_config.model_config.get_vocab_size())


class Float32Head(UnquantizedEmbeddingMethod):
    """Computes logits in float32 whatever the type of the model; the weights stay as they are."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [rows, vocabulary] of hidden states [rows, hidden size]."""
        if x.dtype == torch.float32:
            return super().apply(layer, x, bias)
        if x.is_cuda:
            logits = torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
            return logits if bias is None else logits + bias.float()
        return F.linear(x.float(), layer.weight.float(), None if bias is None else bias.float())


@cache
def scoring_class(model_class: type[nn.Module]) -> type[nn.Module]:
    """A causal language model of vLLM as a pooling model that scores tokens; of such a model, itself."""
    if issubclass(model_class, TokenScoringModel):
        return model_class
    return type(model_class.__name__, (TokenScoringModel, model_class, VllmModelForPooling), {})
