"""Plain next-token training is what Hugging Face's `Trainer` does, step by step, on the same rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import logged
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from weighted_mtp.schemas.configs import TrainConfig, WeightsConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.training.data.loader import RowLoader
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting import make_weighting

pytestmark = pytest.mark.integration

STEPS = 12
ROWS = 4  # of an optimizer step, in two micro-batches


class RecordingTrainer(Trainer):
    """Keeps the loss of every micro-batch, which the log would round."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("normalization", ["tokens", "weight_sum"])
def test_losses_and_parameters_equal_those_of_hugging_faces_trainer(
    normalization: str, model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet], tmp_path: Path
) -> None:
    # Lengths that leave padding at the end of rows, and micro-batches with unequal numbers of targets.
    shards = scored_set([40, 90, 7, 33, 61, 1, 55, 12, 3, 44] * 4)
    config = TrainConfig(
        input=str(shards.path),
        model=str(model_dir("llama")),
        output=str(tmp_path / "run"),
        heads={"offsets": (1,)},
        normalization=normalization,
        optimizer={"learning_rate": 1e-3, "warmup_ratio": 0.25, "max_grad_norm": 0.5},
        sequence_length=64,
        batch_size=ROWS,
        micro_batch_size=2,
        max_steps=STEPS,
        log_every=1,
    )
    train(config)
    lines = logged(config)

    trainer = hugging_face_run(config, packed_rows(config), tmp_path / "trainer")
    losses = [first + second for first, second in zip(trainer.losses[::2], trainer.losses[1::2], strict=True)]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert min(norms) > config.optimizer.max_grad_norm, "clipping has to matter"
    own = load_file(tmp_path / "run" / "model" / "model.safetensors")
    theirs = trainer.model.state_dict()
    assert own.keys() == theirs.keys()
    for name, values in own.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-5)


def packed_rows(config: TrainConfig) -> list[dict[str, Tensor]]:
    """The rows of the whole run, in order; the first token of a document and padding are nobody's target."""
    shards = ZippedSets.open(config.input)
    loader = RowLoader(shards, make_weighting(WeightsConfig(), shards), 64, seed=config.seed)
    batch = next(loader.batches(STEPS * ROWS))
    ids, positions = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.position_ids).long()
    labels = ids.masked_fill(positions == 0, -100)
    return [
        dict(zip(("input_ids", "position_ids", "labels"), row, strict=True))
        for row in zip(ids, positions, labels, strict=True)
    ]


def hugging_face_run(config: TrainConfig, rows: list[dict[str, Tensor]], output: Path) -> RecordingTrainer:
    """The same training with `Trainer`."""
    optimizer = config.optimizer
    model = AutoModelForCausalLM.from_pretrained(str(config.model))
    model.config.use_cache = False  # else documents in a row see each other
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        max_steps=STEPS,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=round(optimizer.warmup_ratio * STEPS),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RecordingTrainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    return trainer
