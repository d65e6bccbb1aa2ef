"""Documents of a packed row do not see each other, with every attention that trains on a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.training.model import mtp_model, trunk
from weighted_mtp.training.model.decoder_layers import compile_layers
from weighted_mtp.training.model.mtp_model import MTPModel, load_model

INSTALLED = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
ATTENTION = ("eager", "sdpa", "flex_attention", *INSTALLED)
HEADS = {
    "residual": HeadsConfig(offsets=(1, 2), block="residual"),
    "decoder": HeadsConfig(offsets=(1, 2), block="decoder"),
    "sequential": HeadsConfig(offsets=(1, 2), kind="sequential"),
}
DOCUMENTS = (37, 256, 1, 130, 600)
"""Lengths in tokens of the documents of one row: the blocks of the kernels have 64 or 128 tokens."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference in nats, averaged over the tokens of a document."""
LEAK = 0.03
"""What documents that see each other differ by, at least, averaged over the tokens of the row."""

pytestmark = pytest.mark.gpu


@pytest.fixture(params=ATTENTION)
def attention(request: pytest.FixtureRequest, rehearsed: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Attention implementations of transformers. On a CPU, sdpa takes the place of flash, and flex is not compiled."""
    name = request.param
    if not rehearsed:
        if name in INSTALLED and not INSTALLED[name]():
            pytest.skip(f"{name} is not installed")
        yield name
        return
    for module in (trunk, mtp_model):
        monkeypatch.setattr(module, "ON_GPU_ONLY", ())
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # only its compiled form has no gradients
    with torch.compiler.set_stance("force_eager" if name == "flex_attention" else "default"):
        yield "sdpa" if name in INSTALLED else name


@pytest.fixture
def build(model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, HeadsConfig], MTPModel]:
    """`build(attention, heads)` loads the model with heads on the device."""

    def load(attention: str, heads: HeadsConfig) -> MTPModel:
        torch.manual_seed(0)
        loaded = mtp_model.build_model(str(model), heads, from_scratch=False, attention=attention).to(device)
        with torch.no_grad():  # residual heads start at zero, decoder heads as copies
            for parameter in loaded.heads.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return loaded

    return load


def packed(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and weights (1, T) of one row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, sum(DOCUMENTS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    return ids.to(device), positions.to(device), torch.ones(ids.shape, device=device)


@pytest.mark.parametrize("heads", HEADS)
def test_losses_are_those_of_the_documents_alone(
    heads: str, attention: str, build: Callable[..., MTPModel], device: torch.device, record_property: Any
) -> None:
    """In float32, which flash attention does not take; the control is the same row as one document."""
    model = build(attention, HEADS[heads])
    ids, positions, weights = packed(device)
    dtype = torch.bfloat16 if attention in INSTALLED else torch.float32
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
        _, sums = model(ids, positions, weights, by_document=True)
        alone = [model(part, torch.arange(part.shape[1], device=device)[None], torch.ones(part.shape, device=device))
                 for part in ids.split(DOCUMENTS, dim=1)]  # fmt: skip
        _, mixed = model(ids, torch.arange(ids.shape[1], device=device)[None], weights)
    expected = torch.stack([sums.plain_loss for _, sums in alone], 1)  # (P, documents)
    targets = torch.tensor([[max(1, length - offset) for length in DOCUMENTS] for offset in (1, 2)], device=device)
    difference = float(((sums.plain_loss - expected).abs() / targets).max())
    record_property("largest_difference_nats", difference)
    control = float((mixed.plain_loss - expected.sum(1)).abs().max() / sum(DOCUMENTS))
    assert difference < TOLERANCES[dtype]
    assert control > LEAK, "otherwise this test shows nothing"


@pytest.mark.parametrize("heads", HEADS)
def test_a_document_has_no_influence_on_the_others(
    heads: str, attention: str, build: Callable[..., MTPModel], device: torch.device
) -> None:
    """The gradient of its loss at the embeddings of all other tokens is exactly 0, also in bfloat16."""
    model = build(attention, HEADS[heads])
    ids, positions, _ = packed(device)
    start = sum(DOCUMENTS[:3])
    own = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    own[:, start : start + DOCUMENTS[3]] = True
    found: list[Tensor] = []
    model.trunk.get_input_embeddings().register_forward_hook(lambda *call: found.append(call[-1]) or call[-1])
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = model(ids, positions, own.float())
    (gradient,) = torch.autograd.grad(loss, found[:1])  # (1, T, D) of the trunk's own embeddings
    assert gradient[own].abs().sum() > 0
    assert gradient[~own].abs().sum() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"], indirect=True)
def test_compiled_layers_compute_the_same(
    attention: str, build: Callable[..., MTPModel], device: torch.device, record_property: Any
) -> None:
    """`--compile true`, with decoder heads, whose layers are compiled, too."""
    ids, positions, weights = packed(device)
    results = []
    for compiled in (False, True):
        model = build(attention, HEADS["decoder"])
        if compiled:
            compile_layers(model)
        with torch.autocast(device.type, torch.bfloat16):
            loss, sums = model(ids, positions, weights, by_document=True)
        loss.backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.trunk.parameters()]).norm()
        results.append((sums.plain_loss.sum(1) / ids.shape[1], norm))
    (losses, norm), (compiled_losses, compiled_norm) = results
    record_property("largest_difference_nats", float((losses - compiled_losses).abs().max()))
    torch.testing.assert_close(compiled_losses, losses, rtol=0, atol=0.02)
    torch.testing.assert_close(compiled_norm, norm, rtol=0.1, atol=0)


def test_a_trained_model_loads_on_the_device(
    build: Callable[..., MTPModel], device: torch.device, tmp_path: Path
) -> None:
    """Saved from the device and loaded again, heads included."""
    model = build("sdpa", HEADS["sequential"])
    model.save(tmp_path)
    again = load_model(str(tmp_path)).to(device)
    ids, positions, weights = packed(device)
    torch.testing.assert_close(again(ids, positions, weights)[0], model(ids, positions, weights)[0])
