"""Training less than everything: heads on a frozen trunk, and low-rank adapters that are merged in the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import logged
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config

from weighted_mtp.schemas.configs import HeadsConfig, LoRAConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.model.mtp_model import build_model, load_model
from weighted_mtp.training.model.trainable_parameters import add_adapters, freeze_trunk
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration

LENGTHS = [40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70]
IDS = torch.arange(24)[None] * 7 % 256


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of eight steps of a model of the given name."""
    shards = scored_set(LENGTHS)

    def build(name: str, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "input": shards.path,
            "model": str(model_dir(name)),
            "output": tmp_path / f"run-{name}",
            "heads": {"offsets": (1, 2)},
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
            "sequence_length": 64,
            "batch_size": 4,
            "max_steps": 8,
            "log_every": 1,
        }
        return TrainConfig(**(settings | changes))

    return build


def curve(config: TrainConfig, key: str) -> list[float]:
    return [line[key] for line in logged(config)]


@pytest.mark.parametrize(
    "heads", [{"block": "residual"}, {"block": "decoder"}, {"kind": "sequential", "coefficients": (1.0, 1.0)}]
)
def test_heads_alone_learn_and_leave_the_trunk_as_it_is(
    heads: dict[str, Any], config: Callable[..., TrainConfig]
) -> None:
    run = config("llama-tied", trainable="heads", heads={"offsets": (1, 2), **heads})
    train(run)
    before = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.output / "model").state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    losses = curve(run, "plain_loss_2")
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("heads", [{"block": "residual"}, {"kind": "sequential"}])
def test_a_second_stage_goes_on_with_the_heads_of_the_first(
    heads: dict[str, Any], config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    first = config("llama", trainable="heads", heads={"offsets": (1, 2), "coefficients": (1.0, 1.0), **heads})
    before = train(first.model_copy(update={"eval_input": first.input}))
    second = first.model_copy(
        update={
            "model": str(first.output),
            "output": tmp_path / "second",
            "trainable": "all",
            "heads": HeadsConfig(offsets=(1, 2), coefficients=(1.0, 0.1), **heads),
        }
    )
    train(second)
    # The first step's losses are those the first stage ended with, on other rows; new heads would lose far more.
    assert curve(second, "plain_loss_2")[0] == pytest.approx(before["eval_loss_2"], abs=0.1)
    assert train(second)["already_complete"]
    with pytest.raises(UserError, match=rf"--model {first.output}: has other heads \(.*offsets \[1, 2\]\); repeat its"):
        train(second.model_copy(update={"heads": HeadsConfig(offsets=(1, 3)), "output": tmp_path / "third"}))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_adapters_are_merged_into_an_ordinary_model(
    architecture: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = config(architecture, trainable="lora", lora={"rank": 4, "alpha": 8.0})
    train(run)
    assert curve(run, "loss")[-1] < curve(run, "loss")[0] - 0.05
    before = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.output / "model").state_dict()
    assert list(before) == list(after)
    changes = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert changes
    assert not any("emb" in name or "lm_head" in name or "wte" in name for name in changes)
    for change in changes.values():
        assert torch.linalg.matrix_rank(change, atol=1e-5) <= 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_model_predicts_what_the_adapters_did(
    architecture: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = build_model(str(model_dir(architecture)), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    add_adapters(model.trunk, LoRAConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.trunk.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save(tmp_path / "run")
    loaded = load_model(str(tmp_path / "run"))
    model.eval()
    expected = model.trunk(IDS).logits
    torch.testing.assert_close(loaded.trunk(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    frozen = AutoModelForCausalLM.from_pretrained(model_dir(architecture))
    assert (frozen(IDS).logits - expected).abs().max() > 0.1


def test_a_frozen_trunk_keeps_no_activations(model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    freeze_trunk(model.trunk)
    positions = torch.arange(24)[None]
    hidden = []
    model.trunk.get_decoder().register_forward_hook(lambda _, args, output: hidden.append(output.last_hidden_state))
    loss, sums = model(IDS, positions, torch.ones(1, 24))
    loss.backward()
    assert hidden[0].grad_fn is None
    assert sums.selected.tolist() == [23, 22]
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert model.heads[0].linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("wrong", ["nothing_here", "lm_head", "embed_tokens"])
def test_modules_that_cannot_have_an_adapter_name_the_flag(wrong: str, config: Callable[..., TrainConfig]) -> None:
    targets = (wrong,) if wrong == "nothing_here" else ("q_proj", wrong)
    with pytest.raises(UserError, match=rf"--lora.targets {','.join(targets)}: .*; name other modules"):
        train(config("llama", trainable="lora", lora={"targets": targets}))


def test_saved_tensors_do_not_name_adapters(config: Callable[..., TrainConfig]) -> None:
    run = config("llama", trainable="lora")
    train(run)
    names = load_file(run.output / "model" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert not list((run.output / "model").glob("adapter*"))


def test_adapters_of_a_multimodal_model_are_in_its_text_layers() -> None:
    text = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    images = {"image_size": 8, "patch_size": 4}
    trunk = AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision | images, mm_tokens_per_image=4)
    )
    add_adapters(trunk, LoRAConfig())
    trainable = [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.startswith("model.language_model.layers.0.") and ".lora_" in name for name in trainable)
