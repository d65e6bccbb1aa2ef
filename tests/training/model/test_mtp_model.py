"""The weighted multi-token-prediction loss over packed rows, against documents run one by one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from weighted_mtp.schemas.configs import HeadsConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.training.loss.normalizer import count_targets
from weighted_mtp.training.model.mtp_model import MTPModel, build_model, load_model
from weighted_mtp.training.model.trunk import decoder_parts, recorded_call

ARCHITECTURES = ["llama", "qwen2-tied", "gemma2", "gpt2", "gpt_neox"]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0]])
DOCUMENTS = [(0, 0, 5), (0, 5, 12), (1, 0, 2), (1, 2, 10)]  # row, start, end; the last two tokens are padding


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, POSITIONS.shape, generator=generator)
    weights = torch.rand(POSITIONS.shape, generator=generator)
    return ids, POSITIONS, torch.where(weights < 0.3, 0.0, weights)


def randomise(model: MTPModel) -> None:
    """Give the heads weights that matter: residual heads start at zero, decoder heads as copies."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter += 0.2 * torch.randn_like(parameter)


def plain_loss(model: MTPModel, ids: Tensor, weights: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Weighted MTP loss written down directly: every document alone, full logits, one target at a time."""
    total = torch.zeros(())
    offsets = model.heads_config.offsets
    for row, start, end in DOCUMENTS:
        x, w = ids[row, start:end], weights[row, start:end]
        layers, norm = decoder_parts(model.trunk)
        with recorded_call(layers[-1]) as last, recorded_call(norm) as before_norm:
            trunk = model.trunk.get_decoder()(input_ids=x[None], use_cache=False).last_hidden_state
        state = before_norm.hidden_states
        for i, (k, c) in enumerate(zip(offsets, coefficients, strict=True)):
            if i == 0:
                hidden = trunk
            elif model.heads_config.kind == "sequential":
                module = model.heads[i - 1]
                ahead = torch.zeros(1, len(x), 32)
                for t in range(1, len(x) - offsets[i - 1]):
                    ahead[0, t] = model.trunk.get_input_embeddings()(x[t + offsets[i - 1]])
                pair = torch.cat([module.hidden_layernorm(state), module.token_layernorm(ahead)], -1)
                state = last.run(module.mtp_block, pair @ module.input_proj.weight.T)
                hidden = module.final_layernorm(state)
            elif model.heads_config.block == "decoder":
                hidden = norm(last.run(model.heads[i - 1], last.hidden_states))
            else:
                hidden = model.heads[i - 1](trunk)
            logits = model.trunk.get_output_embeddings()(hidden)[0]
            if cap := getattr(model.trunk.config, "final_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            for t in range(len(x) - k):
                total = total - c * w[t + k] * logits[t].log_softmax(-1)[x[t + k]]
    return total


HEADS = {
    "residual": {"block": "residual"},
    "decoder": {"block": "decoder"},
    "sequential": {"kind": "sequential"},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_loss_and_gradients_equal_documents_alone(
    architecture: str, kind: str, model_dir: Callable[..., Path]
) -> None:
    heads = HeadsConfig(**HEADS[kind], offsets=(1, 2, 4), coefficients=(1.0, 0.5, 0.25))
    model = build_model(str(model_dir(architecture)), heads, from_scratch=False)
    randomise(model)
    ids, positions, weights = batch()
    loss, sums = model(ids, positions, weights)
    expected = plain_loss(model, ids, weights, (1.0, 0.5, 0.25))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        (sums.weighted_loss * torch.tensor([1.0, 0.5, 0.25])).sum(), expected.detach(), rtol=1e-5, atol=1e-4
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    own, reference = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")])
def test_every_attention_separates_documents(architecture: str, attention: str, model_dir: Callable[..., Path]) -> None:
    model = build_model(
        str(model_dir(architecture)), HeadsConfig(offsets=(1,)), from_scratch=False, attention=attention
    )
    assert model.trunk.config._attn_implementation == attention
    ids, positions, weights = batch()
    torch.testing.assert_close(
        model(ids, positions, weights)[0], plain_loss(model, ids, weights, (1.0,)), rtol=1e-5, atol=1e-4
    )


def test_worked_by_hand(model_dir: Callable[..., Path]) -> None:
    """A zero unembedding predicts every token with probability 1/258, so each target costs its weight times ln 258.

    One row of two documents, weights 1..5 and 10, 20, 30, and a padding token. Offset 1 predicts tokens 2..5 of the
    first document (weights 2+3+4+5 = 14) and 2..3 of the second (20+30 = 50); offset 2 predicts 3+4+5 = 12 and 30: in
    all 64 + 0.5 * 42 = 85.
    """
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1, 2), coefficients=(1.0, 0.5)), from_scratch=False)
    torch.nn.init.zeros_(model.trunk.get_output_embeddings().weight)
    ids = torch.arange(9)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0]])
    weights = torch.tensor([[1.0, 2, 3, 4, 5, 10, 20, 30, 0]])
    loss, sums = model(ids, positions, weights)
    assert loss.item() == pytest.approx(85 * math.log(258), rel=1e-6)
    assert sums.selected.tolist() == [6, 4]
    targets, weight_sum = count_targets(positions, weights, 1)
    assert (targets.item(), weight_sum.item()) == (6, 64)


@pytest.mark.parametrize(
    "settings",
    [{"offsets": (1, 2), "top_coefficient": 1.0}, {"offsets": (1,), "dmtd": {"cycle": 2, "decoding_layers": 1}}],
    ids=["order", "phases"],
)
def test_sums_of_each_document_are_those_of_the_document_alone(
    settings: dict[str, object], model_dir: Callable[..., Path]
) -> None:
    """Of all predictions. The two padding tokens are documents, too."""
    model = build_model(str(model_dir()), HeadsConfig(**settings), from_scratch=False).eval()
    ids, positions, weights = batch()
    _, sums = model(ids, positions, weights, by_document=True)
    for number, (row, start, end) in enumerate(DOCUMENTS):
        _, alone = model(*(values[row : row + 1, start:end] for values in (ids, positions, weights)))
        for own, expected in zip(sums, alone, strict=True):
            assert own.shape == (len(model.heads_config.predictions), len(DOCUMENTS) + 2)
            torch.testing.assert_close(own[:, number].float(), expected, rtol=1e-4, atol=1e-5)
    assert not any(values[:, len(DOCUMENTS) :].any() for values in sums)


def test_targets_without_weight_change_nothing_but_the_count(model_dir: Callable[..., Path]) -> None:
    model = build_model(str(model_dir()), HeadsConfig(offsets=(1,)), from_scratch=False)
    ids, positions, _ = batch()
    loss, sums = model(ids, positions, torch.zeros(positions.shape))
    loss.backward()
    assert loss.item() == 0
    assert sums.selected.tolist() == [0]


def test_generation_settings_that_transformers_does_not_save_stay(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """A temperature without sampling: transformers loads it and refuses to save it."""
    path = model_dir()
    settings = {"eos_token_id": 257, "temperature": 0.6, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(str(path))
    model.save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    assert load_model(str(tmp_path / "run")).trunk.generation_config.temperature == 0.6


@pytest.mark.parametrize("kind", HEADS)
def test_saved_model_is_a_hugging_face_checkpoint_with_heads_beside_it(
    kind: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = build_model(str(model_dir("qwen2-tied")), HeadsConfig(**HEADS[kind], offsets=(1, 3)), from_scratch=False)
    randomise(model)
    model.save(tmp_path / "run")
    loaded = load_model(str(tmp_path / "run"))
    ids, positions, weights = batch()
    torch.testing.assert_close(loaded(ids, positions, weights)[1], model(ids, positions, weights)[1], rtol=0, atol=0)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(alone(ids).logits, model.trunk(ids).logits, rtol=0, atol=0)


def test_with_labels_the_loss_is_a_mean(model_dir: Callable[..., Path]) -> None:
    model = load_model(str(model_dir()), HeadsConfig(offsets=(1, 2)))
    ids, positions, weights = batch()
    total, sums = model(ids, positions, weights)
    labels = ids.masked_fill(positions == 0, -100)
    mean, of_labelled = model(input_ids=ids, position_ids=positions, weights=weights, labels=labels)
    assert mean.item() == pytest.approx(total.item() / 18)
    assert of_labelled.weighted_loss.tolist() == sums.weighted_loss.tolist()
    of_step, _ = model(ids, positions, weights, labels=labels, num_items_in_batch=torch.tensor(36))
    assert of_step.item() == pytest.approx(total.item() / 36)


def test_the_state_has_tied_parameters_once_and_loads(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    path = str(model_dir("qwen2-tied"))
    model, other = (load_model(path, HeadsConfig(offsets=(1, 2))) for _ in range(2))
    randomise(model)
    with torch.no_grad():
        model.trunk.get_input_embeddings().weight += 1
    assert "trunk.lm_head.weight" not in model.state_dict()
    save_file(model.state_dict(), tmp_path / "state.safetensors")  # refuses tensors that share memory
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other.trunk.lm_head.weight is other.trunk.get_input_embeddings().weight
    torch.testing.assert_close(other(*batch())[0], model(*batch())[0], rtol=0, atol=0)


def test_new_heads_that_need_a_run_are_refused(model_dir: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="heads: warmup_ratio needs the number of steps of a run"):
        load_model(str(model_dir()), HeadsConfig(offsets=(1, 2), warmup_ratio=0.1))
