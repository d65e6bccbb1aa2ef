"""The planned memory of a step against the peak of PyTorch's allocator in real training on a CPU."""

from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import free_port
from transformers import AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.memory import Devices, StepMemory, step_memory
from weighted_mtp.training.run.plan import make_model

MEASURED = """
import ctypes, traceback
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.training.run.train import train
from weighted_mtp.training.trainer import TrainingLoop

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger blocks are mapped one by one, in all threads
allocated = lambda: libc.mallinfo2().hblkhd
start = peak = allocated()

class Peak(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global peak
        result = func(*args, **(kwargs or {}))
        peak = max(peak, allocated())
        return result

train_step = TrainingLoop._train_step
def measured_step(self, batch):
    with Peak():
        train_step(self, batch)
TrainingLoop._train_step = measured_step
torch.set_num_threads(1)
try:
    train(TrainConfig.model_validate_json(config))
    open(result, "w").write(str(peak - start))
except BaseException:
    open(result, "w").write(traceback.format_exc())
"""

LENGTH = 256
SIZES = {"vocab_size": 16000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA = LlamaConfig(**SIZES, intermediate_size=1408, num_hidden_layers=4)
TIED = LlamaConfig(**SIZES, intermediate_size=1408, num_hidden_layers=4, tie_word_embeddings=True)
EXPERTS = Qwen3MoeConfig(**SIZES, head_dim=64, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2,
                         num_hidden_layers=4)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tokenizer_dir: Path, make_shard_set: Callable[..., ShardSet]) -> Callable[..., TrainConfig]:
    """`config(architecture, **changes)` are the settings of two steps of a model of about 30 M parameters."""
    documents = [[(7 * row + at) % 256 for at in range(LENGTH // 2)] for row in range(32)]
    shards = make_shard_set(documents, {"loss_reference": [[1.0] * (LENGTH // 2)] * 32})
    defaults: dict[str, Any] = {
        "input": shards.path,
        "output": tmp_path / "run",
        "from_scratch": True,
        "heads": {"offsets": (1,)},
        "sequence_length": LENGTH,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 2,
        "checkpoint_every": 2,
    }

    def build(architecture: PreTrainedConfig, **changes: Any) -> TrainConfig:
        architecture.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
        return TrainConfig(**(defaults | {"model": str(tmp_path / "model")} | changes))

    return build


@pytest.fixture
def measure(start_process: Callable[..., BaseProcess], tmp_path: Path) -> Callable[[TrainConfig, int], int]:
    """`measure(config, processes)` trains, and returns the peak of PyTorch's allocator in the first process, bytes."""

    def run(config: TrainConfig, processes: int) -> int:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
        results = [tmp_path / f"peak-{rank}" for rank in range(processes)]
        ranks = [
            start_process(
                MEASURED,
                environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {},
                config=config.model_dump_json(),
                result=str(results[rank]),
            )
            for rank in range(processes)
        ]
        for process in ranks:
            process.join()
        return int(results[0].read_text())

    return run


def planned(config: TrainConfig, devices: Devices) -> StepMemory:
    with torch.device("meta"):
        model = make_model(config, None)
    return step_memory(model, config, devices, LENGTH)


CASES: dict[str, tuple[PreTrainedConfig, int, dict[str, Any]]] = {
    "one process": (LLAMA, 1, {}),
    "one micro-batch": (LLAMA, 1, {"micro_batch_size": 4}),
    "bfloat16": (LLAMA, 1, {"dtype": "bfloat16"}),
    "checkpointing": (LLAMA, 1, {"activation_checkpointing": True}),
    "four heads": (LLAMA, 1, {"heads": {"offsets": (1, 2, 3, 4)}}),
    "four decoder heads": (TIED, 1, {"heads": {"offsets": (1, 2, 3, 4), "block": "decoder"}}),
    "sequential heads": (TIED, 1, {"heads": {"offsets": (1, 2, 3), "kind": "sequential"}}),
    "token order": (LLAMA, 1, {"heads": {"offsets": (1,), "top_coefficient": 1.0}}),
    "decoding cycle": (LLAMA, 1, {"heads": {"offsets": (1,), "dmtd": {"cycle": 2, "decoding_layers": 1}}}),
    "adapters": (LLAMA, 1, {"trainable": "lora"}),
    "experts": (EXPERTS, 1, {}),
    "live weights": (LLAMA, 1, {"weights": {"preset": "rho1"}}),
    "DDP": (LLAMA, 2, {"micro_batch_size": 1}),
    "FSDP2": (LLAMA, 2, {"fsdp": True, "micro_batch_size": 1}),
    "FSDP2, tied, bfloat16, checkpointing": (
        TIED, 2, {"fsdp": True, "dtype": "bfloat16", "activation_checkpointing": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_that_of_training(
    case: str, config: Callable[..., TrainConfig], measure: Callable[[TrainConfig, int], int]
) -> None:
    architecture, processes, changes = CASES[case]
    settings = config(architecture, **changes)
    devices = Devices(processes, settings.fsdp, gpu=False, bfloat16=settings.dtype == "bfloat16")
    plan = planned(settings, devices)
    peak = measure(settings, processes)
    print(
        f"\nRATIO {case:40s} planned {plan.peak / 2**20:8.1f} measured {peak / 2**20:8.1f} MiB "
        f"ratio {plan.peak / peak:.3f} {plan.peak_in} { {k: round(v / 2**20) for k, v in plan.parts.items()} }"
    )
    assert plan.peak == pytest.approx(peak, rel=0.15)
