"""Memory that runs out and ids that a model does not have: what a worker of `wmtp score` reports."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import PROGRESS
from weighted_mtp.scoring.conditions.models import check_model, check_sequences
from weighted_mtp.scoring.conditions.plan import plan_columns
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, Request
from weighted_mtp.scoring.job.scorer import ScoringTask

pytestmark = pytest.mark.gpu

SMALL_MEMORY = ([512] * 16, 1 << 13, 1 << 9, 300 << 20)
"""Lengths of the sequences, a batch that does not fit, one that does, and bytes, for a CPU."""

WORKER = """
import resource
import numpy as np
import torch
from dataclasses import replace
from weighted_mtp.scoring.job.scorer import load_scoring_engine
from weighted_mtp.scoring.job.units import Unit, new_attempt
from weighted_mtp.scoring.job.worker import ScoringWorker

class Unchecked:
    "Replaces a valid token id by one that the model does not have, after all checks of the job."
    def __init__(self, engine):
        self.engine = engine
    def score(self, requests):
        return self.engine.score([replace(request, input_ids=np.where(
            request.input_ids == replaced_id, np.int32(1_000_000), request.input_ids)) for request in requests])
    def __getattr__(self, name):
        return getattr(self.engine, name)

on_gpu = task.engine.on_gpu
if memory_limit and on_gpu:
    torch.cuda.set_per_process_memory_fraction(memory_limit / torch.cuda.mem_get_info()[1])
worker = ScoringWorker(task, lambda model, config: Unchecked(load_scoring_engine(model, config)))
outcome = worker.start()
if memory_limit and not on_gpu:  # not before: modules and threads of the engine take memory of the same kind
    [used] = [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory_limit, resource.RLIM_INFINITY))
if outcome.kind == "done":
    outcome = worker.score(Unit(shard, new_attempt(shard.name)))
results.put((outcome.kind, outcome.rejects, outcome.reason or str(outcome.error)))
"""


@pytest.fixture
def work(
    start_process: Callable[..., BaseProcess], make_shard_set: Callable[..., ShardSet], tmp_path: Path
) -> Callable[..., tuple[str, int, str]]:
    """`work(model, config, sequences)` scores a shard by a worker of `wmtp score`, in a process of its own.

    With `replaced_id`, the engine gets an id beyond its vocabulary in its place. With `memory_limit`, the process may
    allocate as many bytes on the device. Returns kind, number of rejects and reason of the outcome.
    """

    def run(
        model: Path,
        config: EngineConfig,
        sequences: list[np.ndarray],
        replaced_id: int = -1,
        memory_limit: int | None = None,
    ) -> tuple[str, int, str]:
        place = tmp_path / uuid4().hex
        shards = make_shard_set([ids.tolist() for ids in sequences], parent=place, rows_per_shard=len(sequences))
        output = place / "scored"
        (output / PROGRESS).mkdir(parents=True)
        plan = plan_columns(check_model(str(model), "--reference", shards), None, None)
        results = get_context("spawn").SimpleQueue()
        process = start_process(
            WORKER,
            task=ScoringTask(shards.reader, output, plan, config, None),
            shard=shards.manifest.shards[0],
            results=results,
            replaced_id=replaced_id,
            memory_limit=memory_limit,
        )
        process.join()
        assert not results.empty(), f"the worker ended with status {process.exitcode}"
        return results.get()

    return run


@pytest.fixture(params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest) -> str:
    """Both engines."""
    if request.param == "vllm":
        request.getfixturevalue("vllm_installed")
    return request.param


def test_too_large_a_batch_is_out_of_memory_and_a_smaller_one_is_not(
    engine: str,
    work: Callable[..., tuple[str, int, str]],
    engine_config: Callable[..., EngineConfig],
    make_model: Callable[..., Path],
    random_requests: Callable[..., list[Request]],
    device: torch.device,
    record_property: Any,
) -> None:
    """The driver starts another worker with half the batch. Activations of the wide layer take most of the memory."""
    model = make_model(hidden_size=256, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=1024)  # fmt: skip
    on_gpu = device.type == "cuda"
    lengths, large, small, limit = (256 * [1024], 1 << 18, 1 << 13, 4 << 30) if on_gpu else SMALL_MEMORY
    sequences = [request.input_ids for request in random_requests(lengths)]
    dtype = "bfloat16" if on_gpu else "float32"
    config = engine_config(engine, batch_tokens=large, dtype=dtype)
    kind, _, reason = work(model, config, sequences, memory_limit=limit)
    record_property("worker", f"{kind} {reason}")
    assert kind == "out_of_memory", reason
    assert work(model, config.with_batch(small), sequences, memory_limit=limit)[:2] == ("done", 0)


def test_an_id_that_reaches_the_device_breaks_the_worker_and_not_the_job(
    engine: str,
    work: Callable[..., tuple[str, int, str]],
    make_engine: Callable[..., Engine],
    engine_config: Callable[..., EngineConfig],
    model: Path,
    random_requests: Callable[..., list[Request]],
    device: torch.device,
    record_property: Any,
) -> None:
    """A GPU is unusable for the process after an assert in a kernel; on a CPU, only the sequence is lost."""
    sequences = [request.input_ids % 200 for request in random_requests([40, 60, 50])]
    sequences[1][7] = 250
    kind, rejects, reason = work(model, engine_config(engine), sequences, replaced_id=250)
    record_property("worker", f"{kind} {reason}")
    if device.type == "cuda":
        assert kind == "broken"
        assert "CUDA error" in reason
    else:
        assert (kind, rejects) == ("done", 1)
    again = make_engine(model, engine).score([Request(ids) for ids in sequences])
    assert all(np.isfinite(losses[0, 1:]).all() for losses in again), "another process is not affected"


def test_ids_beyond_the_vocabulary_are_refused_before_an_engine_starts(
    make_model: Callable[..., Path], make_shard_set: Callable[..., ShardSet]
) -> None:
    model = make_model(vocab_size=200)
    shards = make_shard_set([[1, 2, 201]], largest_id=201)
    with pytest.raises(UserError, match="has 200 token ids, but the corpus has the id 201"):
        check_sequences(check_model(str(model), "--reference", shards), "--reference", shards)
