"""Packed rows in a plain PyTorch loop give the losses and the model of `wmtp train`."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from comparing import LENGTHS, logged
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from weighted_mtp import ShardSet, TrainConfig, WeightsConfig, packed_rows, train

pytestmark = pytest.mark.slow

STEPS = 8


def test_a_plain_loop_trains_the_same_model(
    model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet], tmp_path: Path
) -> None:
    shards = scored_set(LENGTHS)
    config = TrainConfig(
        input=shards.path,
        model=str(model_dir()),
        output=tmp_path / "run",
        weights=WeightsConfig(preset="rho1-static"),
        heads={"offsets": (1,)},
        optimizer={"learning_rate": 1e-3, "warmup_ratio": 0.25, "weight_decay": 0.1},
        sequence_length=64,
        batch_size=4,
        max_steps=STEPS,
        log_every=1,
    )
    train(config)

    model = AutoModelForCausalLM.from_pretrained(config.model)
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=config.optimizer.betas,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.25 * STEPS), STEPS)
    losses = []
    for batch in islice(packed_rows(shards, weights="rho1-static", sequence_length=64, batch_size=4), STEPS):
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
        labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        token_losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (weights * token_losses).sum() / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert [line["loss"] for line in logged(config)] == pytest.approx(losses, rel=1e-5)
    for name, values in load_file(config.output / "model" / "model.safetensors").items():
        torch.testing.assert_close(values, model.state_dict()[name], rtol=1e-4, atol=1e-5)
