"""Direct multi-token decoding against its formula, written down layer by layer for documents on their own."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import logged
from torch import Tensor
from transformers import AutoModelForCausalLM

from weighted_mtp.pipelines import evaluate
from weighted_mtp.schemas.configs import DirectDecodingConfig, EvaluateConfig, HeadsConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.model.decoder_layers import checkpoint_activations
from weighted_mtp.training.model.mtp_model import MTPModel, build_model, load_model
from weighted_mtp.training.model.trunk import decoder_parts, recorded_call
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.train import train

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]])
DOCUMENTS = [(0, 0, 5), (0, 5, 12), (1, 1, 11)]  # row, start, end; one token alone is a document, too
IDS = torch.randint(0, 256, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.rand(POSITIONS.shape, generator=torch.Generator().manual_seed(1))


def model_with(path: Path, cycle: int = 3, encoding: int = 1, decoding: int = 1, **settings: Any) -> MTPModel:
    dmtd = DirectDecodingConfig(cycle=cycle, encoding_layers=encoding, decoding_layers=decoding)
    return build_model(str(path), HeadsConfig(offsets=(1,), dmtd=dmtd), from_scratch=False, **settings)


def plain_losses(model: MTPModel, ids: Tensor) -> Tensor:
    """Next-token losses (T - 1,) of one document: the layers one after the other, then full logits."""
    layers, norm = decoder_parts(model.trunk)
    dmtd = model.heads_config.dmtd
    with ExitStack() as stack:
        calls = [stack.enter_context(recorded_call(layer)) for layer in layers]
        model.trunk.get_decoder()(input_ids=ids[None], use_cache=False)
    hidden = encoded = calls[0].hidden_states
    for number, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        if number == dmtd.encoding_layers:
            encoded = hidden
        if number == len(layers) - dmtd.decoding_layers:
            starts = (torch.arange(len(ids)) % dmtd.cycle == 0).float()
            hidden = encoded + hidden * starts[None, :, None]
        hidden = call.run(layer, hidden)
    logits = model.trunk.get_output_embeddings()(norm(hidden))[0]
    if cap := getattr(model.trunk.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return -logits[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def plain_loss(model: MTPModel) -> Tensor:
    return sum(
        (WEIGHTS[r, start + 1 : end] @ plain_losses(model, IDS[r, start:end]) for r, start, end in DOCUMENTS),
        torch.zeros(()),
    )


def assert_same(own: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    """The same value and gradients; a layer without influence has none."""
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4)
    grads = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (own, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(
            *(torch.zeros(()) if grad is None else grad for grad in (a, b)), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(("cycle", "encoding", "decoding"), [(2, 0, 1), (3, 1, 1), (4, 0, 2)])
@pytest.mark.parametrize("architecture", ["llama", "qwen2-tied", "gemma2", "gpt2", "gpt_neox"])
def test_packed_loss_and_gradients_equal_the_formula(
    architecture: str, cycle: int, encoding: int, decoding: int, model_dir: Callable[..., Path]
) -> None:
    model = model_with(model_dir(architecture), cycle, encoding, decoding)
    assert_same(model(IDS, POSITIONS, WEIGHTS)[0], plain_loss(model), list(model.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_activation_checkpointing_and_attention_change_nothing(
    architecture: str, checkpointed: bool, attention: str, model_dir: Callable[..., Path]
) -> None:
    model = model_with(model_dir(architecture), encoding=0, attention=attention)
    expected = plain_loss(model)
    if checkpointed:
        checkpoint_activations(model)
        model.train()
    assert_same(model(IDS, POSITIONS, WEIGHTS)[0], expected, list(model.parameters()))


def test_cycle_one_is_the_plain_model(model_dir: Callable[..., Path]) -> None:
    path = model_dir()
    model, plain = model_with(path, cycle=1, encoding=0, decoding=0), AutoModelForCausalLM.from_pretrained(path)
    expected = torch.zeros(())
    for row, start, end in DOCUMENTS:
        ids = IDS[row, start:end]
        losses = -plain(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        expected = expected + WEIGHTS[row, start + 1 : end] @ losses
    loss = model(IDS, POSITIONS, WEIGHTS)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    own = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(own, torch.autograd.grad(expected, list(plain.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_trunk_is_as_it_was_after_a_pass(model_dir: Callable[..., Path]) -> None:
    """Also after one that fails."""
    path = model_dir()
    model, plain = model_with(path), AutoModelForCausalLM.from_pretrained(path)
    names = list(model.state_dict())
    model(IDS, POSITIONS, WEIGHTS)
    with pytest.raises(IndexError):
        model(IDS + 1000, POSITIONS, WEIGHTS)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.trunk(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


def test_phases_are_reported_by_position_in_the_document(model_dir: Callable[..., Path]) -> None:
    model = model_with(model_dir())
    sums = model(IDS, POSITIONS, torch.ones(POSITIONS.shape))[1]
    assert model.heads_config.predictions == ("1", "phase_0", "phase_1", "phase_2")
    by_phase: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row, start, end in DOCUMENTS:
        for t, loss in enumerate(plain_losses(model, IDS[row, start:end]).tolist()):
            by_phase[t % 3].append(loss)
    assert sums.plain_loss[1:].tolist() == pytest.approx([sum(losses) for losses in by_phase.values()], rel=1e-4)
    assert sums.selected[1:].tolist() == [len(losses) for losses in by_phase.values()] == [7, 6, 6]
    for values in sums:
        torch.testing.assert_close(values[1:].sum(0), values[0])


def test_a_batch_without_weight_gives_zeros_to_all_phases(model_dir: Callable[..., Path]) -> None:
    model = model_with(model_dir())
    loss, sums = model(IDS, POSITIONS, torch.zeros(POSITIONS.shape))
    loss.backward()
    assert loss.item() == 0
    assert [values.tolist() for values in sums] == [[0] * 4] * 6


def test_with_token_order_prediction_both_read_the_same_hidden_states(model_dir: Callable[..., Path]) -> None:
    dmtd = DirectDecodingConfig(cycle=2, decoding_layers=1)
    heads = HeadsConfig(offsets=(1,), dmtd=dmtd, top_coefficient=1.0, top_window=1)
    model = build_model(str(model_dir()), heads, from_scratch=False)
    loss, sums = model(IDS, POSITIONS, WEIGHTS)
    assert model.heads_config.predictions == ("1", "top", "phase_0", "phase_1")
    for values in sums:
        torch.testing.assert_close(values[1], values[0])  # a window of 1 and a copy of the unembedding
    torch.testing.assert_close(loss.detach(), 2 * sums.weighted_loss[0])


@pytest.mark.parametrize(("encoding", "decoding"), [(0, 3), (2, 1), (5, 5)])
def test_a_split_that_leaves_no_layer_to_think_is_refused(
    encoding: int, decoding: int, model_dir: Callable[..., Path]
) -> None:
    with pytest.raises(
        UserError, match=f"{encoding} encoding and {decoding} decoding layers leave none of the model's 3"
    ):
        model_with(model_dir(), 2, encoding, decoding)


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of eight steps in cycles of two."""
    shards = scored_set([40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70])
    held_out = scored_set([30, 50, 1], name="held-out", seed=1)
    model = str(model_dir("gpt2-dropout"))

    def build(name: str, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "input": shards.path,
            "eval_input": held_out.path,
            "model": model,
            "output": tmp_path / name,
            "heads": {"offsets": (1,), "dmtd": {"cycle": 2, "decoding_layers": 1}},
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
            "sequence_length": 64,
            "batch_size": 4,
            "max_steps": 8,
            "checkpoint_every": 4,
            "log_every": 1,
        }
        return TrainConfig(**(settings | changes))

    return build


def test_a_run_learns_with_fixed_embeddings_and_is_found_again(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    summary = train(run)
    lines = logged(run)[:8]
    assert lines[-1]["plain_loss_phase_1"] < lines[0]["plain_loss_phase_1"] - 0.1
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (run.model, run.output / "model"))
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert not torch.equal(before.transformer.h[0].mlp.c_fc.weight, after.transformer.h[0].mlp.c_fc.weight)

    found = evaluate.run(EvaluateConfig(model=str(run.output), input=run.eval_input[0])).losses
    assert [head.prediction for head in found] == ["1", "phase_0", "phase_1"]
    for head in found:
        assert head.loss == pytest.approx(summary[f"eval_loss_{head.prediction}"], rel=1e-5)
    assert found[1].targets + found[2].targets == found[0].targets
    assert load_model(str(run.output)).heads_config == run.heads
    with pytest.raises(UserError, match=r"dmtd cycle 2 with 0 encoding, 1 decoding layers.*repeat its --heads"):
        build_model(str(run.output), HeadsConfig(offsets=(1,)), from_scratch=False)


def test_resumed_equals_uninterrupted_bit_for_bit(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = config("whole"), config("broken", activation_checkpointing=True)
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def die_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(config("broken"))
    for one, other in zip(logged(whole), logged(broken), strict=True):
        same = [key for key in one if "loss" in key]
        assert [one[key] for key in same] == [other[key] for key in same]


def test_from_scratch_embeddings_learn(config: Callable[..., TrainConfig]) -> None:
    run = config("scratch", from_scratch=True, max_steps=2)
    train(run)
    weight = AutoModelForCausalLM.from_pretrained(run.output / "model").get_input_embeddings().weight
    again = config("more", from_scratch=True, max_steps=1, seed=run.seed)
    train(again)
    other = AutoModelForCausalLM.from_pretrained(again.output / "model").get_input_embeddings().weight
    assert not torch.equal(weight, other)


def test_adapters_learn_in_a_cycle(config: Callable[..., TrainConfig]) -> None:
    run = config("adapters", trainable="lora", lora={"rank": 4})
    train(run)
    lines = logged(run)[:8]
    assert lines[-1]["loss"] < lines[0]["loss"]
