"""Token scores inside vLLM: turns vLLM's causal language models into models that return one or two numbers per token.

The model runs as a vLLM pooling model. In each engine step the pooler reduces the hidden states of all scheduled tokens
to scores, so logits exist for a bounded number of positions and only scores leave the engine. Written for vLLM 0.24 to
0.32.
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

from weighted_mtp.scoring.engines.logits import rows_of_logits

TASK = "token_classify"


class TokenScorer(Pooler):
    """Reduces the hidden states of each request to the losses of its tokens and, if requested, their entropies.

    Options of a request in `PoolingParams.extra_kwargs`:
        first_scored: int, first position to score; default 1.
        entropy: bool, whether to also return entropies.

    A result is a float32 tensor [1 or 2, tokens - first_scored]: losses in nats, then entropies in nats.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__()
        self.model = (model,)  # in a tuple: otherwise the model would be a submodule of itself
        self.vocab_size = vocab_size

    def get_supported_tasks(self) -> set[str]:
        """The pooling task that returns a result for each token."""
        return {TASK}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        """Request the token ids of the prompts."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """Score the tokens that this step predicts.

        Args:
            hidden_states: final hidden states of all tokens of the step, [tokens, hidden size].
            pooling_metadata: the requests of the step, in the order of their tokens.

        Returns:
            For each request, its result if this step ends its prompt, else None.
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
            # Position t predicts token t + 1; the last position predicts no token of the prompt.
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
                state.clean()  # a preempted request starts over
            state.hidden_states_cache.append(part if option.get("entropy") else part[:1])
            results.append(torch.cat(state.hidden_states_cache, dim=1) if done else None)
            if done:
                state.clean()
        return results

    def score(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, entropy: bool
    ) -> torch.Tensor:
        """Losses, and entropies if requested, of `targets` [rows] given the hidden states at `rows` [rows].

        Returns:
            float32 [1 or 2, rows].
        """
        if hidden_states.is_cuda:  # a copy from unpinned memory would wait for the forward pass
            rows, targets = rows.pin_memory(), targets.pin_memory()
        rows = rows.to(hidden_states.device, non_blocking=True)
        targets = targets.to(hidden_states.device, non_blocking=True)
        scores = hidden_states.new_empty((1 + entropy, len(rows)), dtype=torch.float32)
        chunk = rows_of_logits(hidden_states, self.vocab_size)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            self.score_chunk(hidden_states[rows[part]], targets[part], scores[:, part])
        return scores

    def score_chunk(self, hidden_states: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor) -> None:
        """Write losses, and entropies if `scores` has a row for them, to `scores` [1 or 2, rows].

        Args:
            hidden_states: [rows, hidden size].
            targets: token ids [rows].
            scores: float32 [1 or 2, rows], filled in place.
        """
        (model,) = self.model
        logits = model.compute_logits(hidden_states)
        if logits is None:  # tensor parallel: only the rank with the logits returns a result
            return
        logits = logits.float()
        scores[0] = F.cross_entropy(logits, targets, reduction="none")
        if len(scores) > 1:
            scores[1] = torch.special.entr(logits.softmax(-1)).sum(-1)


class TokenScoringModel(nn.Module):
    """Mixin for a causal language model: float32 logits and a pooler that scores tokens."""

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
    """Computes float32 logits from weights of any dtype, which stay unchanged."""

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
    """The token-scoring subclass of a vLLM causal language model; `model_class` itself if it already scores tokens."""
    if issubclass(model_class, TokenScoringModel):
        return model_class
    return type(model_class.__name__, (TokenScoringModel, model_class, VllmModelForPooling), {})
