"""How the vLLM engine schedules and distributes requests; test_base.py compares its losses with their definition."""

import os
from contextlib import nullcontext
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.engines.base import Request
from weighted_mtp.scoring.engines.vllm_engine import request_amx, unlink_shared_memory

TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("vllm_installed")


@pytest.mark.parametrize(("supported", "granted"), [(False, False), (True, True), (True, False)])
def test_amx_is_requested_where_there_is_amx(supported, granted, monkeypatch):
    requests = []
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: supported)
    monkeypatch.setattr("torch.cpu._init_amx", lambda: (requests.append(1), granted)[1])
    refused = supported and not granted
    with pytest.raises(UserError, match="does not let this process use AMX") if refused else nullcontext():
        request_amx()
    assert len(requests) == supported


def test_shared_memory_loses_its_name():
    """As vLLM's, whose processes have opened it before."""
    memory = SharedMemory(create=True, size=8)
    name = Path("/dev/shm") / memory.name
    assert name.exists()
    unlink_shared_memory()
    assert not name.exists()
    memory.buf[0] = 7
    assert memory.buf[0] == 7
    memory.close()
    resource_tracker.unregister(memory._name, "shared_memory")


def test_preempted_requests_start_anew(make_engine, reference_model, largest_difference):
    """A cache for half of what runs at once: vLLM drops requests half-way and computes them again."""
    rng = np.random.default_rng(1)
    requests = [Request(rng.integers(0, 258, 256).astype(np.int32)) for _ in range(8)]
    expected = make_engine(reference_model, "transformers").score(requests)
    blocks = 4 * 128 * 2 * 2 * 1 * 32 * 4  # 4 of 128 tokens, with keys and values of 2 layers, 1 head of 32 floats
    tight = make_engine(
        reference_model,
        batch_tokens=96,
        engine_args={"long_prefill_token_threshold": 16, "kv_cache_memory_bytes": blocks},
    )
    preempted = []
    scheduler = tight.engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    assert largest_difference(tight.score(requests), expected) < TOLERANCE
    assert preempted, "otherwise this test shows nothing"


@pytest.mark.slow
def test_tensor_parallel(make_engine, requests, reference_model, monkeypatch, largest_difference):
    """Two processes share the model; the plugin reaches them through its entry point."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    expected = make_engine(reference_model, "transformers").score(requests)
    scores = make_engine(reference_model, tensor_parallel_size=2).score(requests)
    assert largest_difference(scores, expected) < TOLERANCE
