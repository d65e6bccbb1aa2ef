"""One training run from settings to a saved model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoTokenizer, get_scheduler

from schemas.configs import OptimizerConfig, TrainConfig
from schemas.errors import UserError
from schemas.files import sha256_file, write_text
from schemas.fingerprints import model_fingerprint, tokenizer_fingerprint
from schemas.shard_set import ShardSet
from training.evaluation import evaluate_model
from training.loader import RowLoader
from training.loop import TrainingLoop
from training.model import MTPModel, build_model
from training.run import RunDirectory
from training.weights import make_weighting


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says, continuing a stopped run, and return its summary (also in `summary.json`).

    Raises:
        UserError: input, model, settings and output directory do not fit together, or the loss is not finite.
    """
    accelerator = make_accelerator(config.dtype, log_with=list(config.trackers) or None, project_dir=str(config.output))
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch_size {config.batch_size}: give a multiple of the {accelerator.num_processes} processes"
        )
    shards = ShardSet.open(config.input)
    held_out = ShardSet.open(config.eval_input) if config.eval_input else None
    check_tokenizer(config.model, shards)
    if held_out:
        check_same_tokenizer(shards, held_out)
    weighting = make_weighting(config.weights, shards)
    sequence_length = config.sequence_length or shards.manifest.corpus.max_length
    config = config.model_copy(update={"sequence_length": sequence_length})

    run = RunDirectory(config.output)
    if accelerator.is_main_process:
        run.claim(config, {"input": shards.manifest.digest, "model": model_identity(config)})
    accelerator.wait_for_everyone()
    if (finished := run.summary()) is not None:
        return finished | {"already_complete": True}

    set_seed(config.seed)
    mtp_model = build_model(config.model, config.heads, from_scratch=config.from_scratch)
    check_model(mtp_model, config.model, shards, sequence_length)
    tokens_per_step = config.batch_size * sequence_length
    steps = config.max_steps or math.ceil(config.epochs * shards.manifest.tokens / tokens_per_step)
    optimizer, scheduler = make_optimizer(mtp_model, config.optimizer, steps)
    model, optimizer = accelerator.prepare(mtp_model, optimizer)
    loader = RowLoader(shards, weighting, sequence_length, seed=config.seed)
    loop = TrainingLoop(accelerator, config, model, optimizer, scheduler, loader)
    accelerator.register_for_checkpointing(scheduler, loop)
    if (checkpoint := run.latest_checkpoint()) is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"{config.output}: continuing after step {loop.step}")
    if accelerator.is_main_process:
        run.forget_after(loop.step)
    accelerator.init_trackers("wmtp", config={"config": json.dumps(config.model_dump(mode="json"))})

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        losses = evaluate_model(
            accelerator,
            model,
            held_out,
            sequence_length=sequence_length,
            batch_size=config.micro_batch_size,
            max_tokens=config.eval_tokens,
        )
        return {f"eval_loss_{head.offset}": head.loss for head in losses}

    checkpoint_every = config.checkpoint_every or max(1, steps // 10)
    for metrics in loop.run(steps):
        if config.eval_every and loop.step % config.eval_every == 0 and loop.step < steps:
            metrics |= evaluate()
        if metrics:
            accelerator.log(metrics, step=loop.step)
            if accelerator.is_main_process:
                run.log({"step": loop.step} | metrics)
        if loop.step % checkpoint_every == 0 or loop.step == steps:
            loop.check_finite()
            run.save_checkpoint(accelerator, loop.step, config.keep_checkpoints)

    evaluation = evaluate()
    summary = {
        "steps": loop.step,
        "tokens": loop.tokens,
        "seconds": loop.seconds,
        "tokens_per_second": loop.tokens / loop.seconds,
        "loss": loop.metrics["loss"],
        "selected_share": loop.metrics["selected_share"],
        **evaluation,
    }
    accelerator.log(evaluation, step=loop.step)
    if accelerator.is_main_process:
        save_model(mtp_model, shards, config.output)
        if evaluation:
            run.log({"step": loop.step} | evaluation)
        write_text(run.summary_file, json.dumps(summary, indent=2) + "\n")
    accelerator.end_training()
    return summary


def make_accelerator(dtype: str, **kwargs: Any) -> Accelerator:
    """An Accelerator whose compute type is `dtype`: auto is bfloat16 on a GPU and float32 on a CPU."""
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available())
    return Accelerator(mixed_precision="bf16" if bfloat16 else "no", step_scheduler_with_optimizer=False, **kwargs)


def make_optimizer(model: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, with weight decay on matrices only, and its learning rate schedule over `steps` steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return optimizer, get_scheduler(name, optimizer, round(config.warmup_ratio * steps), steps)


def check_tokenizer(model: str, shards: ShardSet) -> None:
    """Refuse a model that comes with another tokenizer than the corpus. A model without one is not refused.

    Raises:
        UserError: the fingerprints differ.
    """
    if Path(model).is_dir() and not (Path(model) / "tokenizer_config.json").exists():
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return  # loading the model itself reports what is wrong with its name
    expected = shards.manifest.tokenizer
    if tokenizer_fingerprint(tokenizer) != expected.fingerprint:
        raise UserError(
            f"--model {model}: its tokenizer is not that of {shards.path} ({expected.name}); "
            "prepare the corpus with this model's tokenizer"
        )


def check_same_tokenizer(shards: ShardSet, other: ShardSet) -> None:
    """Raise UserError unless two shard sets have the same tokenizer."""
    if shards.manifest.tokenizer.fingerprint != other.manifest.tokenizer.fingerprint:
        raise UserError(f"{other.path}: has another tokenizer than {shards.path}; prepare both with the same one")


def check_model(model: MTPModel, name: str, shards: ShardSet, sequence_length: int) -> None:
    """Refuse a model that has fewer embeddings than the corpus has ids, or fewer positions than a document may take.

    Raises:
        UserError: the model is too small for the shard set.
    """
    size, needed = model.trunk.get_output_embeddings().weight.shape[0], shards.manifest.tokenizer.vocab_size
    if size < needed:
        raise UserError(
            f"--model {name}: has {size} embeddings but the tokenizer of {shards.path} has {needed} ids; "
            "use a model made for this tokenizer"
        )
    positions = getattr(model.trunk.config, "max_position_embeddings", None)
    longest = min(sequence_length, shards.manifest.corpus.max_length)
    if positions is not None and positions < longest:
        raise UserError(
            f"--model {name}: reads at most {positions} tokens, {shards.path} has sequences of up to {longest}; "
            f"give --sequence_length {positions}, or prepare with --max_length {positions}"
        )


def model_identity(config: TrainConfig) -> str:
    """What a continued run must find under --model: a fingerprint of a directory, else the hub id."""
    directory = Path(config.model)
    if not directory.is_dir():
        return config.model
    if config.from_scratch and (directory / "config.json").exists():
        return sha256_file(directory / "config.json")
    return model_fingerprint(directory)


def save_model(model: MTPModel, shards: ShardSet, output: Path) -> None:
    """Write `model/` (with the corpus's tokenizer) and `heads/` into the run, named only when they are complete."""
    partial = output / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    shutil.copytree(shards.tokenizer_path, partial / "model", dirs_exist_ok=True)
    for name in ("model", "heads"):
        shutil.rmtree(output / name, ignore_errors=True)
        (partial / name).replace(output / name)
    partial.rmdir()
