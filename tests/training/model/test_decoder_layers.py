"""Which modules are decoder layers, and that checkpointed ones run again in the backward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.model.decoder_layers import all_layers, checkpoint_activations, compile_layers, trunk_layers
from weighted_mtp.training.model.mtp_model import MTPModel, build_model

DECODER = {"offsets": (1, 2, 3), "block": "decoder"}


@pytest.fixture
def build(model_dir: Callable[..., Path]) -> Callable[..., MTPModel]:
    """Models of three layers."""
    return lambda name, **heads: build_model(str(model_dir(name)), HeadsConfig(**heads), from_scratch=False)


@pytest.mark.parametrize(
    ("heads", "in_heads"),
    [
        ({"offsets": (1, 2), "block": "residual"}, 0),
        (DECODER, 2),
        ({"offsets": (1, 2, 3), "kind": "sequential"}, 2),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_of_the_trunk_come_first_then_those_of_the_heads(
    architecture: str, heads: dict[str, Any], in_heads: int, build: Callable[..., MTPModel]
) -> None:
    model = build(architecture, **heads)
    layers = all_layers(model)
    assert layers[:3] == trunk_layers(model)
    assert len(layers) == 3 + in_heads
    assert len({type(layer) for layer in layers}) == 1
    assert len(set(map(id, layers))) == len(layers)
    assert all(any(layer is module for module in model.heads.modules()) for layer in layers[3:])


def test_checkpointed_layers_run_again_in_the_backward_pass_and_change_no_gradient(
    build: Callable[..., MTPModel],
) -> None:
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    positions, weights = torch.arange(12)[None], torch.ones(1, 12)
    gradients, runs = [], []
    for checkpointed in (False, True):
        model = build("llama", **DECODER).train()
        if checkpointed:
            checkpoint_activations(model)
        counts = [0] * 5
        for number, layer in enumerate(all_layers(model)):

            def count(*_: object, number: int = number, counts: list[int] = counts) -> None:
                counts[number] += 1

            layer.mlp.register_forward_pre_hook(count)
        loss, _ = model(ids, positions, weights)
        loss.backward()
        runs.append(counts)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert runs == [[1] * 5, [2] * 5]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_an_architecture_without_checkpointing_names_the_flag(
    build: Callable[..., MTPModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", offsets=(1,))
    monkeypatch.setattr(type(model.trunk), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"does not support gradient checkpointing.*; train it without --activation"):
        checkpoint_activations(model)


def test_the_forward_of_every_layer_is_compiled_once(
    build: Callable[..., MTPModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether compiled layers compute the same is tested in `test_sharding.py`: compiling takes long."""
    model = build("llama", **DECODER)
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward: (compiled.append(forward.__self__), forward)[1])
    compile_layers(model)
    assert [id(layer) for layer in compiled] == [id(layer) for layer in all_layers(model)]
