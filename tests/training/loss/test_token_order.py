"""Token order prediction against its formula: first occurrences found one by one, a full softmax, autograd."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import logged
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from weighted_mtp.pipelines import evaluate
from weighted_mtp.schemas.configs import EvaluateConfig, HeadsConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.weights.language import parse_formula
from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.loss.token_order import TokenOrder, previous_occurrences
from weighted_mtp.training.model.mtp_model import MTPModel, build_model, load_model
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting.batch import LiveWeighting

POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]])
IDS = torch.tensor([[3, 1, 3, 2, 1, 3, 1, 1, 0, 2], [2, 2, 0, 1, 0, 2, 1, 3, 4, 4]])


def plain_shares(ids: Tensor, positions: Tensor, row: int, t: int, window: int, vocabulary: int) -> Tensor:
    """`softmax(y)` (V,) of one position, float64."""
    y = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
    for d in range(window):
        s = t + 1 + d
        if s == ids.shape[1] or positions[row, s] != positions[row, t] + 1 + d:
            break
        y[ids[row, s]] = max(y[ids[row, s]].item(), window - d)
    return y.softmax(-1)


def predicting(positions: Tensor) -> list[tuple[int, int]]:
    """Positions with a next token in their document."""
    rows, length = positions.shape
    return [(r, t) for r in range(rows) for t in range(length - 1) if positions[r, t + 1] == positions[r, t] + 1]


def test_worked_by_hand() -> None:
    """After the first `a` of `a b c b a`, b comes at d = 0, c at 1, and a at 3; the second b came already."""
    ids, positions = torch.tensor([[0, 1, 2, 1, 0, 2]]), torch.tensor([[0, 1, 2, 3, 4, 0]])
    tokens, shares = TokenOrder(ids, positions, None).target_probabilities(torch.tensor([1]))
    total = 1 + math.exp(-1) + math.exp(-3)
    assert tokens[0, :4].tolist() == [1, 2, 1, 0]
    assert shares[0].tolist() == pytest.approx([1 / total, math.exp(-1) / total, 0, math.exp(-3) / total, 0, 0])
    assert TokenOrder(ids, positions, 3).target_probabilities(torch.tensor([1]))[1].tolist()[0] == pytest.approx(
        [1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)), 0]
    )


def test_previous_occurrences_stay_in_their_document() -> None:
    tokens = torch.tensor([5, 5, 7, 5, 5, 7, 7])
    documents = torch.tensor([1, 1, 1, 1, 2, 2, 2])
    assert previous_occurrences(tokens, documents).tolist() == [-1, 0, -1, 1, -1, -1, 5]
    assert previous_occurrences(tokens[:0], documents[:0]).tolist() == []


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100, None])
def test_shares_equal_a_softmax_over_the_vocabulary(window: int | None) -> None:
    order = TokenOrder(IDS, POSITIONS, window)
    for row, t in predicting(POSITIONS):
        tokens, shares = order.target_probabilities(torch.tensor([row * 10 + t + 1]))
        found = torch.zeros(5, dtype=torch.float64).index_add_(0, tokens[0], shares[0].double())
        torch.testing.assert_close(found, plain_shares(IDS, POSITIONS, row, t, window or 10, 5), rtol=1e-6, atol=1e-7)


def test_far_tokens_have_no_share_in_float32_whatever_the_window() -> None:
    """400 different tokens: 104 entries are the whole softmax in float32, in a window of 400 as in one of 104."""
    ids, positions = torch.arange(401)[None], torch.arange(401)[None]
    tokens, shares = TokenOrder(ids, positions, 400).target_probabilities(torch.tensor([1]))
    whole = torch.arange(400, 0, -1).float().softmax(-1)
    assert shares.shape == (1, 104)
    assert whole[104:].tolist() == [0] * 296
    torch.testing.assert_close(torch.nn.functional.pad(shares[0], (0, 296)), whole, rtol=1e-6, atol=0)
    assert tokens[0].tolist() == list(range(1, 105))


@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_loss_and_gradients_equal_autograd_in_float64(window: int | None, chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 6, generator=generator, dtype=torch.float64).requires_grad_()
    matrix = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    where = predicting(POSITIONS)
    rows = torch.tensor([row * 10 + t for row, t in where])
    weights = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    result = multi_head_cross_entropy(
        [hidden],
        [HeadGroup([0], lambda tensors, index: [tensors[0][index[0]]])],
        [HeadTargets(rows, rows + 1, weights)],
        matrix,
        torch.full((1,), 0.5, dtype=torch.float64),
        chunk_rows=chunk_rows,
        objective=TokenOrder(IDS, POSITIONS, window),
    )
    shares = torch.stack([plain_shares(IDS, POSITIONS, row, t, window or 10, 5) for row, t in where])
    losses = -(shares * (hidden[rows] @ matrix.T).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(result.token_losses, losses.detach(), rtol=1e-6, atol=1e-7)
    expected = 0.5 * (losses @ weights)
    leaves = (hidden, matrix)
    for own, reference in zip(
        torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-6, atol=1e-7)


def test_a_window_of_one_is_next_token_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, matrix = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (16, 5))
    where = predicting(POSITIONS)
    places = torch.tensor([row * 10 + t + 1 for row, t in where])
    weights = torch.rand(len(where), generator=generator)
    found = []
    for targets, objective in ((places, TokenOrder(IDS, POSITIONS, 1)), (IDS.flatten()[places], None)):
        loss, losses = weighted_linear_cross_entropy(
            hidden[: len(where)], matrix, targets, weights, objective=objective
        )
        found.append((loss.detach(), losses, *torch.autograd.grad(loss, (hidden, matrix))))
    for own, reference in zip(*found, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-6, atol=1e-6)


def with_order(path: Path, **settings: Any) -> MTPModel:
    """A pretrained model with token order prediction whose parameters all matter."""
    model = build_model(str(path), HeadsConfig(**settings), from_scratch=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (*model.heads.parameters(), model.top.weight):  # type: ignore[union-attr]
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "heads", [{"block": "residual"}, {"block": "decoder"}, {"kind": "sequential", "coefficients": (1.0, 0.5)}]
)
@pytest.mark.parametrize("architecture", ["llama-tied", "gemma2", "gpt2"])
def test_adds_to_the_loss_of_all_heads(
    architecture: str, heads: dict[str, Any], model_dir: Callable[..., Path]
) -> None:
    """Without bias and soft-cap, of the same hidden states and weights as offset 1."""
    model = with_order(model_dir(architecture), offsets=(1, 2), top_coefficient=0.5, top_window=4, **heads)
    assert model.top is not None
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0))
    weights[weights < 0.3] = 0
    loss, sums = model(IDS, POSITIONS, weights)
    top, model.top = model.top, None
    without, others = model(IDS, POSITIONS, weights)
    hidden = model.trunk.get_decoder()(input_ids=IDS, position_ids=POSITIONS, use_cache=False).last_hidden_state
    log_probabilities = top(hidden).log_softmax(-1)
    losses = {
        (r, t): -(plain_shares(IDS, POSITIONS, r, t, 4, 258).float() * log_probabilities[r, t]).sum()
        for r, t in predicting(POSITIONS)
    }
    order = sum((weights[r, t + 1] * losses[r, t] for r, t in losses), torch.zeros(()))
    torch.testing.assert_close(loss, without + 0.5 * order, rtol=1e-5, atol=1e-5)
    for values, other in zip(sums, others, strict=True):
        torch.testing.assert_close(values[:2], other, rtol=0, atol=0)
    carries = [at for at in losses if weights[at[0], at[1] + 1] > 0]
    correct = sum(int(log_probabilities[r, t].argmax() == IDS[r, t + 1]) for r, t in carries)
    expected = [order.item(), sum(losses[at].item() for at in carries), len(carries), correct]
    assert [values[2].item() for values in sums[:4]] == pytest.approx(expected, rel=1e-5)
    parameters = [*model.parameters(), top.weight]
    own = torch.autograd.grad(loss, parameters)
    reference = torch.autograd.grad(without + 0.5 * order, parameters)
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_live_weights_are_those_of_offset_1(model_dir: Callable[..., Path]) -> None:
    model = with_order(model_dir(), offsets=(1,), top_coefficient=1.0)
    stored = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) * 3 + 4
    live = LiveWeighting(parse_formula("normalise(top(live, 0.4), by=batch)"))
    sums = model(IDS, POSITIONS, stored[..., None], live=live)[1]
    assert sums.selected[1] == sums.selected[0] == math.ceil(0.4 * len(predicting(POSITIONS)))
    assert [values[1].item() for values in sums[4:]] == pytest.approx([values[0].item() for values in sums[4:]])


def test_a_batch_without_weight_gives_zeros(model_dir: Callable[..., Path]) -> None:
    model = with_order(model_dir(), offsets=(1,), top_coefficient=1.0)
    loss, sums = model(IDS, POSITIONS, torch.zeros(IDS.shape))
    loss.backward()
    assert loss.item() == 0
    assert [values.tolist() for values in sums] == [[0] * 2] * 6
    assert model.top is not None
    assert model.top.weight.grad is not None  # every process must have one to add up
    assert not model.top.weight.grad.any()


def test_starts_as_the_unembedding_of_a_pretrained_trunk_and_random_of_a_new_one(
    model_dir: Callable[..., Path],
) -> None:
    path, config = str(model_dir()), HeadsConfig(offsets=(1,), top_coefficient=1.0)
    pretrained, new = (build_model(path, config, from_scratch=scratch) for scratch in (False, True))
    for model, same in ((pretrained, True), (new, False)):
        unembedding = model.trunk.get_output_embeddings().weight
        assert model.top is not None
        assert torch.equal(model.top.weight, unembedding) == same
        assert model.top.weight is not unembedding
    assert new.top is not None
    assert new.top.weight.std().item() == pytest.approx(new.trunk.config.initializer_range, rel=0.05)
    assert build_model(path, HeadsConfig(offsets=(1,)), from_scratch=False).top is None


@pytest.fixture
def config(
    tmp_path: Path, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet]
) -> Callable[..., TrainConfig]:
    """`config(name, **changes)` are the settings of eight steps with token order prediction."""
    shards = scored_set([40, 90, 7, 120, 33, 64, 1, 80, 55, 100, 12, 70])
    held_out = scored_set([30, 50, 1], name="held-out", seed=1)
    model = str(model_dir("llama-tied"))

    def build(name: str, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "input": shards.path,
            "eval_input": held_out.path,
            "model": model,
            "output": tmp_path / name,
            "weights": {"preset": "rho1-static"},
            "heads": {"offsets": (1, 2), "top_coefficient": 1.0, "top_window": 16},
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.0},
            "sequence_length": 64,
            "batch_size": 4,
            "max_steps": 8,
            "checkpoint_every": 4,
            "log_every": 1,
        }
        return TrainConfig(**(settings | changes))

    return build


def test_a_run_learns_the_order_and_is_found_again(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    run = config("run")
    summary = train(run)
    lines = logged(run)[:8]
    for line in lines:
        whole = line["weighted_loss_1"] + line["weighted_loss_2"] + line["weighted_loss_top"]
        assert line["loss"] == pytest.approx(whole, rel=1e-5)
    assert lines[-1]["plain_loss_top"] < lines[0]["plain_loss_top"] - 0.1

    plain = AutoModelForCausalLM.from_pretrained(run.output / "model")
    assert not any("top" in name for name in plain.state_dict())
    assert set(load_file(run.output / "heads" / "heads.safetensors")) == {"0.linear.weight", "top.weight"}
    found = evaluate.run(EvaluateConfig(model=str(run.output), input=run.eval_input[0]))
    [first, second, order] = found.losses
    assert [head.prediction for head in (first, second, order)] == ["1", "2", "top"]
    assert order.loss == pytest.approx(summary["eval_loss_top"], rel=1e-5)
    assert order.targets == first.targets

    second_stage = config("second", model=str(run.output), max_steps=1)
    train(second_stage)
    found = json.loads((second_stage.output / "metrics.jsonl").read_text().splitlines()[0])
    assert found["plain_loss_top"] == pytest.approx(lines[-1]["plain_loss_top"], abs=0.15)
    with pytest.raises(UserError, match=r"offsets \[1, 2\], token order prediction\); repeat its --heads"):
        build_model(str(run.output), HeadsConfig(offsets=(1, 2)), from_scratch=False)
    assert load_model(str(run.output)).heads_config.top_window == 16


def test_resumed_equals_uninterrupted_bit_for_bit(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = config("whole"), config("broken")
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def die_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(broken)
    one, other = (load_file(run.output / "heads" / "heads.safetensors") for run in (whole, broken))
    assert torch.equal(one["top.weight"], other["top.weight"])
    ends = [json.loads((run.output / "metrics.jsonl").read_text().splitlines()[-2]) for run in (whole, broken)]
    assert ends[0]["plain_loss_top"] == ends[1]["plain_loss_top"]


def test_heads_alone_learn_with_it_on_a_frozen_trunk(config: Callable[..., TrainConfig]) -> None:
    run = config("frozen", trainable="heads", max_steps=2)
    train(run)
    before = AutoModelForCausalLM.from_pretrained(run.model)
    after = AutoModelForCausalLM.from_pretrained(run.output / "model")
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    learnt = load_file(run.output / "heads" / "heads.safetensors")["top.weight"]
    assert not torch.equal(learnt, before.get_output_embeddings().weight)


def test_its_factor_rises_with_those_of_the_heads(config: Callable[..., TrainConfig]) -> None:
    heads = {"offsets": (1,), "top_coefficient": 0.5, "warmup_ratio": 0.5}
    run = config("warmup", heads=heads, max_steps=4)
    train(run)
    lines = logged(run)[:4]
    factors = [(line["loss"] - line["weighted_loss_1"]) / line["weighted_loss_top"] for line in lines]
    assert factors == pytest.approx([0, 0.25, 0.5, 0.5], abs=1e-4)
