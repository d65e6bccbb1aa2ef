"""The planned memory of a step, by hand, and against what real training on a CPU allocates."""

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

# Eager updates of 8-bit moments have temporary tensors that compiled ones, which the plan is for, do not have.
measured = "_accumulate_gradients" if "adamw8bit" in config else "_train_step"
plain = getattr(TrainingLoop, measured)
def measured_step(*arguments):
    with Peak():
        return plain(*arguments)
setattr(TrainingLoop, measured, measured_step)
torch.set_num_threads(1)
if "adamw8bit" in config: torch.compiler.set_stance("force_eager")  # compiling its steps takes a minute
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
    """`measure(config, processes)` trains; returns the most bytes that were allocated after any operator of a step.

    Blocks of 64 KiB or more count, of all threads of the first process, less those from before the training.
    """

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
    "8-bit moments": (LLAMA, 1, {"optimizer": {"kind": "adamw8bit"}}),
    "live weights": (LLAMA, 1, {"weights": {"preset": "rho1"}}),
    "DDP": (LLAMA, 2, {"micro_batch_size": 1}),
    "FSDP2": (LLAMA, 2, {"fsdp": True, "micro_batch_size": 1}),
    "FSDP2, 8-bit moments": (
        LLAMA, 2, {"fsdp": True, "micro_batch_size": 1, "optimizer": {"kind": "adamw8bit"}},
    ),
    "FSDP2, tied, bfloat16, checkpointing": (
        TIED, 2, {"fsdp": True, "dtype": "bfloat16", "activation_checkpointing": True},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_that_of_training(
    case: str, config: Callable[..., TrainConfig], measure: Callable[[TrainConfig, int], int]
) -> None:
    architecture, processes, changes = CASES[case]
    if "optimizer" in changes:
        pytest.importorskip("torchao")
    settings = config(architecture, **changes)
    devices = Devices(processes, settings.fsdp, gpu=False, bfloat16=settings.dtype == "bfloat16")
    plan = planned(settings, devices)
    peak = measure(settings, processes)
    print(
        f"\nRATIO {case:40s} planned {plan.peak / 2**20:8.1f} measured {peak / 2**20:8.1f} MiB "
        f"ratio {plan.peak / peak:.3f} {plan.peak_in} { {k: round(v / 2**20) for k, v in plan.parts.items()} }"
    )
    assert plan.peak == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    "devices",
    [
        Devices(1, shard=False, gpu=False, bfloat16=False),
        Devices(4, shard=False, gpu=True, bfloat16=True),
        Devices(4, shard=True, gpu=True, bfloat16=True),
    ],
    ids=["one process", "DDP", "FSDP2"],
)
def test_parts_by_hand(devices: Devices, config: Callable[..., TrainConfig]) -> None:
    """All but activations and loss are multiples of the parameters; a tied matrix counts once."""
    plan = planned(config(TIED, batch_size=16), devices)
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1408 + 2 * 512
    size = 4 * (16000 * 512 + 4 * layer + 512)
    held = size / (devices.processes if devices.shard else 1)
    assert plan.parts["parameters"] == pytest.approx(held, rel=1e-3)  # and small buffers
    assert plan.parts["moments"] == pytest.approx(2 * held, rel=1e-3)
    assert plan.parts["gradients"] == pytest.approx(held, rel=1e-3)
    assert plan.parts.get("buckets of DDP", 0) == (size if devices.processes > 1 and not devices.shard else 0)
    assert plan.model == pytest.approx(size, rel=1e-3)
    if devices.shard:  # embeddings, one layer in bfloat16, and the next
        assert plan.parts["copies of other processes' shards, and their gradients"] > 4 * 16000 * 512


def test_products_of_a_gpu_are_in_bfloat16(config: Callable[..., TrainConfig]) -> None:
    """In addition to what float32 takes: the unembedding, its gradient of a chunk, the logits, and their gradient."""
    settings = config(LLAMA)
    cpu, gpu = (planned(settings, Devices(1, shard=False, gpu=gpu, bfloat16=True)) for gpu in (False, True))
    unembedding, logits = 16000 * 512, 16000 * 2 * (LENGTH - 1)
    assert gpu.parts["heads and loss"] - cpu.parts["heads and loss"] == 2 * (2 * unembedding + 2 * logits)
