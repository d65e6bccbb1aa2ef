"""Hugging Face's `Trainer` and TRL's `SFTTrainer` take the steps of `wmtp train` on the same rows."""

from collections.abc import Callable
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from comparing import free_port, logged, trained
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from weighted_mtp.schemas.configs import EvaluateConfig, TrainConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.training.data.collate import collate_rows
from weighted_mtp.training.data.packed_rows import packed_rows
from weighted_mtp.training.model.mtp_model import load_model
from weighted_mtp.training.model.weighted_loss import add_weighted_loss, weighted_loss
from weighted_mtp.training.run.evaluate import evaluate
from weighted_mtp.training.run.train import train
from weighted_mtp.training.weighting.token_weights import token_weights

pytestmark = pytest.mark.integration

STEPS = 12
LENGTHS = [40, 90, 7, 33, 61, 1, 55, 12, 3, 44] * 4
"""They leave padding at the end of rows, and micro-batches with unequal numbers of targets."""

HEADS = {
    "no heads": {"offsets": (1,)},
    "residual": {"offsets": (1, 2)},
    "decoder": {"offsets": (1, 3), "block": "decoder", "coefficients": (1.0, 0.5)},
    "sequential": {"offsets": (1, 2, 3), "kind": "sequential"},
}

RANK = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from weighted_mtp import TrainConfig, add_weighted_loss, collate_rows, load_model, packed_rows, weighted_loss
torch.set_num_threads(1)
config = TrainConfig.model_validate_json(config)
set_seed(config.seed)
if len(config.heads.offsets) > 1:
    model = load_model(str(config.model), config.heads)
else:
    model = AutoModelForCausalLM.from_pretrained(str(config.model), dtype=torch.float32)
    add_weighted_loss(model)
rows = packed_rows(config.input, weights=config.weights, sequence_length=64, seed=config.seed)
trainer = Trainer(
    model, TrainingArguments(**settings), collate_rows, train_dataset=rows, compute_loss_func=weighted_loss
)
trainer.train()
assert trainer.accelerator.num_processes == 2
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
torch.save({"losses": losses, "model": model.state_dict()}, result)
"""


@pytest.fixture
def run(model_dir: Callable[..., Path], scored_set: Callable[..., ShardSet], tmp_path: Path) -> Callable[..., Any]:
    """`run(model="llama", **changes)` are the settings of a run of `wmtp train`."""

    def make(model: str = "llama", **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "input": str(scored_set(LENGTHS).path),
            "model": str(model_dir(model)),
            "output": str(tmp_path / "run"),
            "weights": {"preset": "rho1-static"},
            "heads": {"offsets": (1,)},
            "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.25, "max_grad_norm": 0.5},
            "sequence_length": 64,
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "log_every": 1,
        }
        return TrainConfig(**settings | changes)

    return make


def with_weights(config: TrainConfig) -> nn.Module:
    """The Hugging Face model of a run, prepared for weights."""
    model = AutoModelForCausalLM.from_pretrained(str(config.model), dtype=torch.float32)
    add_weighted_loss(model)
    return model


def with_heads(config: TrainConfig) -> nn.Module:
    """The model of a run with the heads that `wmtp train` starts with."""
    set_seed(config.seed)
    return load_model(str(config.model), config.heads)


def rows_of(config: TrainConfig) -> Any:
    """The rows of a run."""
    return packed_rows(config.input, weights=config.weights, sequence_length=64, seed=config.seed)


def arguments(config: TrainConfig, output: Path, make: Callable[..., Any] = TrainingArguments, **changes: Any) -> Any:
    """The settings of a run for `Trainer`."""
    optimizer = config.optimizer
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // config.micro_batch_size,
        "max_steps": config.max_steps,
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": optimizer.schedule,
        "warmup_steps": round(optimizer.warmup_ratio * config.max_steps),
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return make(**settings | changes)


def trainer_of(config: TrainConfig, model: nn.Module, output: Path, **changes: Any) -> Trainer:
    """A `Trainer` for the steps of a run."""
    return Trainer(
        model=model,
        args=arguments(config, output, **changes),
        train_dataset=rows_of(config),
        data_collator=collate_rows,
        compute_loss_func=weighted_loss,
    )


def history(trainer: Trainer, name: str = "loss") -> list[float]:
    """A value of every step, over all processes."""
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_same_parameters(own: dict[str, Tensor], model: nn.Module) -> None:
    """Compare the parameters of a run with those of a model, by the names in the run."""
    theirs = {name.removeprefix("trunk.").removeprefix("heads."): value for name, value in model.state_dict().items()}
    assert own.keys() <= theirs.keys()
    for name, values in own.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "heads", "weights"),
    [
        pytest.param("llama", "no heads", {"preset": "uniform"}, marks=pytest.mark.slow),
        ("llama", "no heads", {"preset": "rho1-static"}),
        pytest.param("gemma2", "no heads", {"preset": "dense", "lam": 0.25}, marks=pytest.mark.slow),
        pytest.param("llama", "residual", {"preset": "rho1-static"}, marks=pytest.mark.slow),
        pytest.param("llama", "decoder", {"preset": "dense", "lam": 0.25}, marks=pytest.mark.slow),
        ("llama-tied", "sequential", {"preset": "rho1-static"}),
    ],
)
def test_losses_and_parameters_are_those_of_wmtp_train(
    architecture: str, heads: str, weights: dict[str, Any], run: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = run(architecture, heads=HEADS[heads], weights=weights)
    train(config)
    lines = logged(config)
    trainer = trainer_of(config, (with_weights if heads == "no heads" else with_heads)(config), tmp_path / "trainer")
    trainer.train()
    assert [line["loss"] for line in lines] == pytest.approx(history(trainer), rel=1e-5)
    norms = history(trainer, "grad_norm")
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert min(norms) > config.optimizer.max_grad_norm, "clipping has to matter"
    assert_same_parameters(trained(config), trainer.model)


@pytest.mark.parametrize(("architecture", "heads"), [("llama", "no heads"), ("llama-tied", "sequential")])
def test_a_resumed_training_equals_an_uninterrupted_one(
    architecture: str, heads: str, run: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = run(architecture, heads=HEADS[heads])
    saving = {"save_strategy": "steps", "save_steps": 5}
    make = with_weights if heads == "no heads" else with_heads
    whole = trainer_of(config, make(config), tmp_path / "trainer", **saving)
    whole.train()
    # In the same process, with rows that were iterated before, as in a notebook.
    resumed = trainer_of(config, make(config), tmp_path / "trainer", **saving)
    resumed.train_dataset = whole.train_dataset
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-5"))
    assert history(resumed) == history(whole)
    expected = whole.model.state_dict()
    for name, values in resumed.model.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)


def test_separate_sequences_give_the_loss_of_each_alone(
    run: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = run()
    weights = list(token_weights(config.input, config.weights))
    data = datasets.load_dataset(str(config.input[0]), split="train", cache_dir=str(tmp_path / "cache"))
    data = data.add_column("weights", weights)
    model = with_weights(config)
    total = 0.0
    for row in data.select(range(4)):
        ids, of_row = torch.tensor([row["input_ids"]]), torch.tensor(row["weights"])
        with torch.no_grad():
            losses = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total += float(losses @ of_row[1:])
    trainer = Trainer(
        model,
        arguments(config, tmp_path / "trainer", train_sampling_strategy="sequential", max_steps=1),
        collate_rows,
        train_dataset=data,
        compute_loss_func=weighted_loss,
    )
    trainer.train()
    assert history(trainer) == [pytest.approx(total / (sum(LENGTHS[:4]) - 4), rel=1e-5)]


@pytest.mark.parametrize("heads", ["no heads", "residual"])
def test_the_models_own_loss_and_evaluation(heads: str, run: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """Without a loss function, with recomputed activations and a tracker that reads the config of the model."""
    config = run(heads=HEADS[heads])
    make = with_weights if heads == "no heads" else with_heads
    expected = trainer_of(config, make(config), tmp_path / "expected", max_steps=2)
    expected.train()
    held_out = list(islice(rows_of(config), 4))
    settings = {"gradient_checkpointing": True, "report_to": "tensorboard", "per_device_eval_batch_size": 4}
    trainer = Trainer(
        make(config),
        arguments(config, tmp_path / "trainer", max_steps=2, **settings),
        collate_rows,
        train_dataset=rows_of(config),
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert history(trainer) == pytest.approx(history(expected), rel=1e-6)
    assert before == pytest.approx(history(expected)[0], rel=1e-5), "the rows of the first step"


@pytest.mark.parametrize("heads", ["no heads", "sequential"])
def test_a_trained_model_is_loaded_and_evaluated(heads: str, run: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = run("llama-tied", heads=HEADS[heads], max_steps=1)
    train(config)
    trainer = trainer_of(config, (with_weights if heads == "no heads" else with_heads)(config), tmp_path)
    trainer.train()
    saved = tmp_path / "saved"
    if heads == "no heads":
        trainer.save_model(str(saved))
    else:
        trainer.model.save(saved)
    assert load_model(str(saved)).heads_config == config.heads
    own, theirs = (
        evaluate(EvaluateConfig(model=str(path), input=config.input[0], sequence_length=64)).losses
        for path in (config.output, saved)
    )
    assert [head.prediction for head in own] == [head.prediction for head in theirs]
    assert [head.loss for head in own] == pytest.approx([head.loss for head in theirs], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["no heads", "residual"])
def test_two_processes_equal_one(
    heads: str, run: Callable[..., TrainConfig], start_process: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    config = run(heads=HEADS[heads])
    train(config)
    port = free_port()
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    settings = arguments(config, tmp_path / "trainer", dict, gradient_accumulation_steps=1)
    ranks = [
        start_process(
            RANK,
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            config=config.model_dump_json(),
            settings=settings,
            result=str(tmp_path / f"rank-{rank}"),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank-{rank}") for rank in range(2))
    assert [line["loss"] for line in logged(config)] == pytest.approx(first["losses"], rel=1e-5)
    own = trained(config)
    for name, values in first["model"].items():
        torch.testing.assert_close(values, second["model"][name], rtol=0, atol=0)
        expected = own[name.removeprefix("trunk.").removeprefix("heads.")]
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["subclass", "compute_loss_func"])
def test_sft_trainer_takes_the_steps_of_wmtp_train(
    way: str, run: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTConfig, SFTTrainer

    class WeightedSFTTrainer(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # TRL would send telemetry
    config = run()
    train(config)
    rows = rows_of(config)
    trainer = (WeightedSFTTrainer if way == "subclass" else SFTTrainer)(
        with_weights(config),
        arguments(
            config,
            tmp_path / "trainer",
            SFTConfig,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
        ),
        data_collator=collate_rows,
        train_dataset=datasets.IterableDataset.from_generator(lambda: rows),
        processing_class=AutoTokenizer.from_pretrained(str(config.model)),
        compute_loss_func=weighted_loss if way == "compute_loss_func" else None,
    )
    trainer.compute_loss_func = weighted_loss
    trainer.train()
    assert [line["loss"] for line in logged(config)] == pytest.approx(history(trainer), rel=1e-5)
    assert_same_parameters(trained(config), trainer.model)
