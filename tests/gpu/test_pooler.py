"""The scorer inside vLLM in bfloat16, with the attention and the matrix products of a GPU, against transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weighted_mtp.scoring.engines.base import Engine, Request

LENGTHS = [300, 2, 1024, 77, 1, 513, 128, 900]
BACKENDS = ("default", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION")
"""Attention of vLLM; a CPU has one only."""
TOLERANCE = 0.5
"""Nats, root mean square: bfloat16 takes about 0.2 from the losses of random models, which are near 15."""

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("vllm_installed")]


def flat(scores: list[np.ndarray], line: int) -> np.ndarray:
    """A quantity of all tokens that have a context, one after the other."""
    return np.concatenate([score[line, 1:] for score in scores])


def error(scores: list[np.ndarray], expected: list[np.ndarray], line: int) -> float:
    """Root mean square of the difference of a quantity, in nats."""
    return float(np.sqrt(np.mean((flat(scores, line) - flat(expected, line)) ** 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(
    backend: str,
    model: Path,
    make_engine: Callable[..., Engine],
    random_requests: Callable[..., list[Request]],
    rehearsed: bool,
    record_property: Any,
) -> None:
    """Losses and entropies. Batches of 512 tokens cut the sequences into chunks, so caches are read, too."""
    requests = random_requests(LENGTHS, ("loss", "entropy"))
    exact = make_engine(model, "transformers", dtype="float32").score(requests)
    reference = make_engine(model, "transformers").score(requests)
    arguments = {} if rehearsed or backend == "default" else {"attention_config": {"backend": backend}}
    scores = make_engine(model, "vllm", batch_tokens=512, engine_args=arguments).score(requests)
    for line, quantity in enumerate(("loss", "entropy")):
        own, others = error(scores, exact, line), error(reference, exact, line)
        record_property(f"{quantity}_rms_nats", own)
        record_property(f"{quantity}_rms_nats_of_transformers", others)
        assert 0 < own < 1.5 * others < TOLERANCE


def test_sequences_of_a_batch_do_not_see_each_other(
    model: Path, make_engine: Callable[..., Engine], random_requests: Callable[..., list[Request]], record_property: Any
) -> None:
    requests = random_requests(LENGTHS)
    engine = make_engine(model, "vllm")
    together = engine.score(requests)
    alone = [engine.score([request])[0] for request in requests]
    record_property("rms_nats", error(together, alone, 0))
    assert error(together, alone, 0) < TOLERANCE
    others = [Request(ids, 0) for ids in (request.input_ids[::-1].copy() for request in requests[:-1])]
    changed = engine.score([*others, requests[-1]])
    assert error(changed[:1], together[:1], 0) > 5 * TOLERANCE, "otherwise this test shows nothing"
    assert error(changed[-1:], together[-1:], 0) < TOLERANCE


def test_logits_of_a_large_vocabulary_are_float32(
    make_model: Callable[..., Path],
    make_engine: Callable[..., Engine],
    random_requests: Callable[..., list[Request]],
    rehearsed: bool,
    record_property: Any,
) -> None:
    """A batch takes several chunks of them."""
    vocabulary = 8192 if rehearsed else 151936
    model = make_model(vocab_size=vocabulary, hidden_size=256, num_attention_heads=4, max_position_embeddings=1024)
    requests = random_requests(LENGTHS)
    exact = make_engine(model, "transformers", dtype="float32").score(requests)
    engine = make_engine(model, "vllm")
    scores = engine.score(requests)
    own, others = (error(found, exact, 0) for found in (scores, make_engine(model, "transformers").score(requests)))
    record_property("loss_rms_nats", own)
    record_property("loss_rms_nats_of_transformers", others)
    assert own < 1.2 * others < TOLERANCE
    head = engine.engine.model_executor.driver_worker.model_runner.model
    logits = head.compute_logits(torch.zeros(3, 256, dtype=torch.bfloat16, device=next(head.parameters()).device))
    assert logits.dtype == torch.float32
    assert logits.shape == (3, vocabulary)
