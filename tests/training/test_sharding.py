"""One process, DDP, FSDP2 and Ray Train compute the same, and continue each other's runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import metrics, trained
from safetensors.torch import load_file

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.run.directory import RunDirectory
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration

LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70] * 3


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of a short run of a tied Llama with decoder heads in float32."""
    shards, held_out = scored_set(LENGTHS), scored_set(LENGTHS[:6], name="held-out", seed=1)
    defaults: dict[str, Any] = {
        "input": shards.path,
        "model": str(model_dir("llama-tied")),
        "eval_input": held_out.path,
        "weights": {"preset": "dense", "lam": 0.25},
        "heads": {"offsets": (1, 2), "block": "decoder"},
        "optimizer": {"learning_rate": 1e-3},
        "dtype": "float32",
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 1,
        "max_steps": 8,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    return lambda name, **changes: TrainConfig(**(defaults | {"output": tmp_path / name} | changes))


def assert_equal(one: TrainConfig, other: TrainConfig, rel: float = 1e-6) -> None:
    """The same metrics at every step, held-out losses among them, and the same parameters."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert b == pytest.approx(a, rel=rel, abs=1e-6)  # standard errors are small differences of losses
    parameters = trained(other)
    assert parameters.keys() == trained(one).keys()
    for name, value in trained(one).items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama-tied", {"heads": {"offsets": (1, 2), "block": "decoder"}}),
        pytest.param("llama", {"heads": {"offsets": (1, 2)}}, marks=pytest.mark.slow),
        pytest.param(
            "llama-tied",
            {
                "heads": {"offsets": (1, 2), "top_coefficient": 1.0},
                "objective": {"kind": "diversity_or_precision", "lambda_tail": -0.1, "top_k": 5},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "llama",
            {"weights": {"formula": "top(long_short, 0.5, by=batch)", "control": "random", "warmup_ratio": 0.5}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "llama",
            {
                "heads": {"offsets": (1,), "top_coefficient": 1.0, "dmtd": {"cycle": 2, "decoding_layers": 1}},
                "activation_checkpointing": True,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_equal_one(
    architecture: str,
    changes: dict[str, Any],
    config: Callable[..., TrainConfig],
    model_dir: Callable[..., Path],
    launch: Callable[..., None],
) -> None:
    """DDP and FSDP2, two micro-batches in each rank, four in one process."""
    settings = {"model": str(model_dir(architecture)), **changes}
    one, ddp, fsdp = config("one", **settings), config("ddp", **settings), config("fsdp", fsdp=True, **settings)
    train(one)
    launch(ddp, 2)
    launch(fsdp, 2)
    assert_equal(one, ddp)
    assert_equal(one, fsdp)


@pytest.mark.slow
def test_four_ranks_equal_four_micro_batches(config: Callable[..., TrainConfig], launch: Callable[..., None]) -> None:
    one, four = config("one"), config("four", fsdp=True)
    train(one)
    launch(four, 4)
    assert_equal(one, four)


@pytest.mark.slow
def test_a_checkpoint_continues_on_other_ranks(
    config: Callable[..., TrainConfig], launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two shards to one process and back."""
    settings = {"max_steps": 6, "checkpoint_every": 2}
    whole, broken = config("whole", **settings), config("broken", fsdp=True, **settings)
    train(whole)
    launch(broken, 2, stop_at=2)
    save = RunDirectory.save_checkpoint

    def stop_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert sorted(path.name for path in (broken.output / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    launch(broken, 2)
    assert_equal(whole, broken)


@pytest.mark.slow
def test_shards_resume_bit_for_bit(
    config: Callable[..., TrainConfig], model_dir: Callable[..., Path], launch: Callable[..., None]
) -> None:
    """With dropout, whose random states each rank has of its own."""
    settings = {"model": str(model_dir("gpt2-dropout")), "fsdp": True, "max_steps": 4, "checkpoint_every": 2}
    whole, broken = config("whole", **settings), config("broken", **settings)
    launch(whole, 2)
    launch(broken, 2, stop_at=2)
    launch(broken, 2)
    assert metrics(whole) == metrics(broken)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name


@pytest.mark.slow
def test_eight_bit_moments_of_shards(
    config: Callable[..., TrainConfig], model_dir: Callable[..., Path], launch: Callable[..., None]
) -> None:
    """Two shards train as one process does, and one process continues them."""
    pytest.importorskip("torchao")
    settings = {"model": str(model_dir("llama-wide")), "heads": {"offsets": (1, 2)}}
    settings |= {"optimizer": {"kind": "adamw8bit", "learning_rate": 1e-3}, "max_steps": 4, "checkpoint_every": 2}
    one, two, broken = config("one", **settings), config("two", fsdp=True, **settings), config("broken", **settings)
    with torch.compiler.set_stance("force_eager"):
        train(one)
    launch(two, 2)
    launch(broken.model_copy(update={"fsdp": True}), 2, stop_at=2)
    with torch.compiler.set_stance("force_eager"):
        train(broken)
    for other in (two, broken):
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-3)  # a rounding difference may change a code


def test_a_checkpoint_that_lost_a_shard_is_refused(
    config: Callable[..., TrainConfig], launch: Callable[..., None]
) -> None:
    run = config("run", fsdp=True, max_steps=2, keep_checkpoints=True)
    launch(run, 2)
    (run.output / "summary.json").unlink()
    second = run.output / "checkpoints" / "step-00000002" / "shard-00002-model-00001-of-00001.safetensors"
    embeddings = load_file(second)["model.trunk.model.embed_tokens.weight"]
    assert len(embeddings) == 258 // 2
    second.unlink()
    with pytest.raises(UserError, match=r"step-00000002: cannot be loaded .*shard-00002.* remove it to continue"):
        train(run)


@pytest.mark.slow
def test_shards_in_bfloat16_train_as_one_process_does(
    config: Callable[..., TrainConfig], launch: Callable[..., None]
) -> None:
    one, two = config("one", dtype="bfloat16"), config("two", dtype="bfloat16", fsdp=True)
    train(one)
    launch(two, 2)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        losses = {name: value for name, value in a.items() if "accuracy" not in name}  # one target more or less is much
        assert {name: b[name] for name in losses} == pytest.approx(losses, rel=1e-2)
    assert all(value.dtype == torch.float32 for value in trained(two).values())


@pytest.mark.parametrize("block", ["decoder", "residual"])
def test_activation_checkpointing_changes_nothing(block: str, config: Callable[..., TrainConfig]) -> None:
    heads = {"offsets": (1, 2), "block": block}
    plain = config("plain", heads=heads, max_steps=4)
    checkpointed = config("other", heads=heads, max_steps=4, activation_checkpointing=True)
    train(plain)
    train(checkpointed)
    assert_equal(plain, checkpointed)


@pytest.mark.slow
def test_activation_checkpointing_of_shards(config: Callable[..., TrainConfig], launch: Callable[..., None]) -> None:
    plain = config("plain", max_steps=4)
    checkpointed = config("other", max_steps=4, fsdp=True, activation_checkpointing=True)
    train(plain)
    launch(checkpointed, 2)
    assert_equal(plain, checkpointed)


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_layers_compute_the_same(activation_checkpointing: bool, config: Callable[..., TrainConfig]) -> None:
    plain = config("plain")
    compiled = config("compiled", compile=True, activation_checkpointing=activation_checkpointing)
    train(plain)
    train(compiled)
    assert_equal(plain, compiled, rel=1e-4)


@pytest.mark.slow
def test_compiled_shards(config: Callable[..., TrainConfig], launch: Callable[..., None]) -> None:
    plain, compiled = config("plain"), config("compiled", compile=True, fsdp=True)
    train(plain)
    launch(compiled, 2)
    assert_equal(plain, compiled, rel=1e-4)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported; give --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
    ],
)
def test_what_accelerate_launch_may_not_ask_for(
    variables: dict[str, str], sentence: str, config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        train(config("run"))
    assert not config("run").output.exists()
