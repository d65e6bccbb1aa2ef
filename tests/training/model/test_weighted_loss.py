"""The weighted loss of models of transformers, against full logits of documents run one by one."""

import copy
import inspect
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GraniteConfig

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data.packed_rows import packed_rows
from weighted_mtp.training.model.weighted_loss import add_weighted_loss, weighted_loss

Batch = dict[str, Tensor]


@pytest.fixture
def load(model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """Load a model of transformers for training."""
    return lambda name="llama": AutoModelForCausalLM.from_pretrained(model_dir(name), dtype=torch.float32).eval()


@pytest.fixture
def batch(scored_set: Callable[..., ShardSet]) -> Batch:
    shards = scored_set([20, 7, 13, 30, 5])
    return next(islice(packed_rows(shards, weights="rho1-static", sequence_length=32, batch_size=2), 1, None))


def sum_alone(model: Any, batch: Batch) -> Tensor:
    """The sum of weighted losses with every document in a forward pass of its own."""
    total = torch.zeros(())
    for ids, positions, weights in zip(batch["input_ids"], batch["position_ids"], batch["weights"], strict=True):
        ends = [*(positions == 0).nonzero()[1:, 0].tolist(), len(ids)]
        for start, end in zip([0, *ends], ends, strict=False):
            logits = model(input_ids=ids[None, start:end]).logits[0]
            total = total + weights[start + 1 : end] @ cross_entropy(
                logits[:-1], ids[start + 1 : end], reduction="none"
            )
    return total


@pytest.mark.parametrize("architecture", ["llama", "qwen2-tied", "gemma2", "gpt2", "gpt_neox", "phi3"])
def test_loss_and_gradients_equal_documents_alone(architecture: str, load: Callable[..., Any], batch: Batch) -> None:
    model = load(architecture)
    expected = sum_alone(model, batch) / (batch["labels"] != -100).sum()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    add_weighted_loss(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    for own, theirs in zip(torch.autograd.grad(loss, parameters, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-5)


def test_the_loss_is_a_sum_without_labels(load: Callable[..., Any], batch: Batch) -> None:
    model = load()
    add_weighted_loss(model)
    expected = sum_alone(model, batch)
    labels = batch.pop("labels")
    outputs = model(**batch, num_items_in_batch=7, use_cache=True)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=7).loss, expected / 7)
    torch.testing.assert_close(weighted_loss(outputs, labels, num_items_in_batch=torch.tensor(7)), expected / 7)
    torch.testing.assert_close(weighted_loss(outputs, labels), expected / (labels != -100).sum())
    assert outputs.logits is None


def test_without_weights_nothing_changes(load: Callable[..., Any], batch: Batch) -> None:
    model = load()
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    expected, tokens = model(**inputs), model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
    add_weighted_loss(model)
    torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs).loss, expected.loss, rtol=0, atol=0)
    assert torch.equal(model.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False), tokens)
    assert "weights" in inspect.signature(model.forward).parameters


def test_a_copy_uses_its_own_parameters(load: Callable[..., Any], batch: Batch) -> None:
    model = load()
    add_weighted_loss(model)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.lm_head.weight)
    selected = batch["weights"].sum() / (batch["labels"] != -100).sum()
    assert twin(**batch).loss.item() == pytest.approx(selected.item() * torch.tensor(258.0).log().item())
    assert twin(input_ids=batch["input_ids"]).logits.abs().max() == 0
    assert model(input_ids=batch["input_ids"]).logits.abs().max() > 0


@pytest.mark.parametrize("first", ["weights", "adapters"])
def test_adapters_train_with_weights(first: str, load: Callable[..., Any], batch: Batch) -> None:
    model = load()
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    if first == "weights":
        add_weighted_loss(model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, settings).eval()
    expected = sum_alone(adapted, batch) / (batch["labels"] != -100).sum()
    if first == "adapters":
        add_weighted_loss(adapted)
    loss = adapted(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_what_would_be_wrong_is_refused(load: Callable[..., Any], batch: Batch) -> None:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    granite = AutoModelForCausalLM.from_config(GraniteConfig(**shape, num_key_value_heads=2, logits_scaling=2.0))
    with pytest.raises(UserError, match="are not its final hidden states times the unembedding"):
        add_weighted_loss(granite)
    model = load()
    with pytest.raises(UserError, match="the model returned no loss; prepare it with add_weighted_loss"):
        weighted_loss(model(input_ids=batch["input_ids"]), batch["labels"])
    add_weighted_loss(model)
    with pytest.raises(UserError, match="give position_ids that restart at 0 in every document, without an attention"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
