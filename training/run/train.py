"""One training run, from settings to a saved model: open inputs, build the training state, fit, save."""

import json
import shutil
import tempfile
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import set_seed
from torch import Tensor, nn

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.pretrained import OwnCodeError
from weighted_mtp.schemas.progress import MakeBar, hidden_bar
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import fsync, fsync_tree
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.schemas.storage.training_run import HEADS, MODEL
from weighted_mtp.schemas.tokenizers import load_corpus_tokenizer
from weighted_mtp.training.data.mixing import make_loader
from weighted_mtp.training.evaluation import evaluate_model
from weighted_mtp.training.model.decoder_layers import checkpoint_activations, compile_layers
from weighted_mtp.training.model.flops import StepFlops
from weighted_mtp.training.model.mtp_model import MTPModel, build_model
from weighted_mtp.training.model.trainable_parameters import select_trainable
from weighted_mtp.training.model.trunk import choose_attention
from weighted_mtp.training.optimizer import make_optimizer
from weighted_mtp.training.run.checkpoint import TrainingState
from weighted_mtp.training.run.compatibility import model_tokenizer
from weighted_mtp.training.run.directory import RunDirectory
from weighted_mtp.training.run.inputs import RunInputs, open_inputs
from weighted_mtp.training.run.object_store import ObjectStoreCopy
from weighted_mtp.training.run.preconditions import SAVING, TRACKING, in_bfloat16
from weighted_mtp.training.schedules import make_learning_rate_schedule
from weighted_mtp.training.sharding import distribute, full_state, sharding_requested
from weighted_mtp.training.trainer import TrainingLoop


@dataclass(frozen=True)
class Training:
    """A run that is ready to train.

    Attributes:
        mtp_model: the unwrapped model.
        model: the same model on the devices (wrapped under DDP).
        loop: the training loop.
        state: the contents of a checkpoint.
    """

    mtp_model: MTPModel
    model: nn.Module
    loop: TrainingLoop
    state: TrainingState


def train(config: TrainConfig, progress: MakeBar = hidden_bar) -> dict[str, Any]:
    """Train, or resume a stopped run, and return its summary (also in `summary.json`).

    Args:
        config: the settings of `wmtp train`; `ray_workers` and `ray_address` are ignored.
        progress: makes the bars of steps, of evaluations, and of passes over the corpus.

    Raises:
        UserError: input, model, settings or output directory are incompatible, or training diverges.
    """
    store = None if isinstance(config.output, Path) else ObjectStoreCopy(config.output)
    path = store.path if store else config.output
    with sharding_requested(config.fsdp) as shard:
        accelerator = make_accelerator(config.dtype, log_with=list(config.trackers) or None, project_dir=str(path))
        with (
            exclusive(config.output) if accelerator.is_main_process else nullcontext(),
            closing(store) if store and accelerator.is_local_main_process else nullcontext(),
        ):
            inputs = open_inputs(config, accelerator.num_processes)
            run = RunDirectory(inputs.config, inputs.identity(), store, accelerator.num_processes)
            run.fetch(accelerator)
            run.check()
            if (finished := run.summary()) is not None:
                if accelerator.is_main_process:
                    run.remove_checkpoints()
                return finished | {"already_complete": True}
            training = build(accelerator, inputs, run, shard=shard, progress=progress)
            fit(accelerator, inputs, run, training)
            summary = save(accelerator, inputs, run, training)
            del training
            # Frees DDP's reducer before the process group. As the last owner of the group, it would wait for the
            # threads of gloo without releasing the interpreter that they need.
            accelerator.free_memory()
            accelerator.wait_for_everyone()  # a process that exits early breaks the process group
            accelerator.end_training()
            return summary


def make_accelerator(dtype: str, **kwargs: Any) -> Accelerator:
    """Make an Accelerator that computes in `dtype`; auto is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        UserError: an earlier Accelerator of this process computes in another one.
    """
    mixed_precision = "bf16" if in_bfloat16(dtype, gpu=torch.cuda.is_available()) else "no"
    if is_initialized() and AcceleratorState().mixed_precision != mixed_precision:
        raise UserError("--dtype: this process already computes in another dtype; use that one, or a new process")
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.accelerator.is_available(),  # without this, processes on CPUs do not form a group
        **kwargs,
    )


def build(
    accelerator: Accelerator, inputs: RunInputs, run: RunDirectory, *, shard: bool, progress: MakeBar
) -> Training:
    """Build model, data and optimizer, and restore the newest checkpoint.

    Raises:
        UserError: the model cannot be loaded or does not fit the data, or the checkpoint cannot be loaded.
    """
    config = inputs.config
    set_seed(config.seed)
    attention = choose_attention(config.attention, accelerator.device)
    mtp_model = build_model(
        config.model,
        config.heads,
        from_scratch=config.from_scratch,
        attention=attention,
        trust_remote_code=config.trust_remote_code,
    )
    inputs.check_fit(mtp_model)
    check_saving(mtp_model, config, inputs.shards.first)
    select_trainable(mtp_model.trunk, config)
    set_seed(config.seed, device_specific=True)  # dropout differs between processes
    loader = make_loader(config, inputs.shards, inputs.mixed, inputs.sequence_length, progress)
    steps = inputs.scheduled_steps(loader.rows_per_epoch())
    flops = StepFlops(mtp_model)
    model = place_model(accelerator, mtp_model, config, shard=shard)
    optimizer = make_optimizer(mtp_model, config.optimizer)
    scheduler = make_learning_rate_schedule(optimizer, config.optimizer, steps)
    loop = TrainingLoop(accelerator, config, model, optimizer, scheduler, loader, flops, steps, progress)
    state = TrainingState(mtp_model, optimizer, scheduler, {"loop": loop}, config.seed)
    run.load_checkpoint(accelerator, state)
    if accelerator.is_main_process:
        run.claim(loop.step, loop.steps)
    accelerator.init_trackers(TRACKING, config={"config": json.dumps(config.model_dump(mode="json"))})
    return Training(mtp_model, model, loop, state)


def check_saving(model: MTPModel, config: TrainConfig, shards: ShardSet) -> None:
    """Save a model without its weights, to find out before training what would stop that after it.

    Raises:
        UserError: the model cannot be saved.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model.save(scratch, {})
            save_tokenizer(config, shards, Path(scratch) / MODEL)
        except UserError:
            raise
        except Exception as error:  # of transformers, or of the code of a model
            reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
            raise UserError(
                f"--model {config.model}: could not be saved after training ({reason}); correct it"
            ) from error


def save_tokenizer(config: TrainConfig, shards: ShardSet, directory: Path) -> None:
    """Write the tokenizer of the corpus beside the model; if it needs code of its own, that of `config.model`.

    No other file of a shard set gets into the model, and no reference to code, which could run with that of the model.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer: Any = load_corpus_tokenizer(shards)
        tokenizer.init_kwargs.pop("auto_map", None)
    except OwnCodeError:
        tokenizer = model_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def place_model(accelerator: Accelerator, model: MTPModel, config: TrainConfig, *, shard: bool) -> nn.Module:
    """Apply activation checkpointing and compilation as configured, and place the model on the devices."""
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_layers(model)
    return distribute(accelerator, model, shard=shard)


def fit(accelerator: Accelerator, inputs: RunInputs, run: RunDirectory, training: Training) -> None:
    """Run all remaining steps, with logging, evaluations and checkpoints.

    Raises:
        UserError: training diverged, no step had a finite loss and weight, or a checkpoint cannot be written.
    """
    config, loop = inputs.config, training.loop
    checkpoint_every = config.checkpoint_every or max(1, loop.steps // 10)
    for metrics in loop.run():
        if config.eval_every and loop.step % config.eval_every == 0 and loop.step < loop.steps:
            metrics |= evaluate(accelerator, inputs, training)
        if metrics:
            accelerator.log(metrics, step=loop.step)
            if accelerator.is_main_process:
                run.log({"step": loop.step} | metrics)
        if loop.step % checkpoint_every == 0 or loop.step == loop.steps:
            loop.prepare_checkpoint()
            run.save_checkpoint(accelerator, training.state, loop.step)

    skipped = loop.accumulator.counters["bad_steps"] + loop.accumulator.counters["no_signal_steps"]
    if skipped >= loop.step:
        raise UserError(
            f"--weights: none of the {loop.step} steps had a target with weight and a "
            "finite loss, so the model is unchanged; choose other weights and another --output"
        )


def evaluate(accelerator: Accelerator, inputs: RunInputs, training: Training) -> dict[str, float]:
    """Metrics on --eval_input; empty without it."""
    if inputs.held_out is None:
        return {}
    losses = evaluate_model(
        accelerator,
        training.model,
        inputs.held_out.first,
        sequence_length=inputs.sequence_length,
        batch_size=inputs.config.micro_batch_size,
        max_tokens=inputs.config.eval_tokens,
        progress=training.loop.progress,
    )
    names = ("loss", "standard_error", "accuracy", "targets", "documents")
    metrics = {f"eval_{name}_{head.prediction}": getattr(head, name) for name in names for head in losses}
    return metrics | {"eval_sequence_length": inputs.sequence_length}


def save(accelerator: Accelerator, inputs: RunInputs, run: RunDirectory, training: Training) -> dict[str, Any]:
    """Evaluate, save the model, finish the run, and return its summary.

    Raises:
        UserError: the model cannot be written.
    """
    loop = training.loop
    evaluation = evaluate(accelerator, inputs, training)
    summary = {
        "steps": loop.step,
        "continued_steps": max(0, loop.step - loop.scheduled_steps),
        "tokens": loop.tokens,
        "seconds": loop.seconds,
        "tokens_per_second": loop.tokens / loop.seconds,
        "loss": loop.metrics["loss"],
        "selected_share": loop.metrics["selected_share"],
        "memory_gib": loop.metrics["memory_gib"],
        **loop.accumulator.counters,
        **evaluation,
    }
    accelerator.log(evaluation, step=loop.step)
    weights = full_state(accelerator, training.mtp_model)
    if weights is not None:
        save_model(training.mtp_model, weights, inputs.shards.first, run)
        if evaluation:
            run.log({"step": loop.step} | evaluation)
        run.finish(summary)
    return summary


def save_model(model: MTPModel, weights: dict[str, Tensor], shards: ShardSet, run: RunDirectory) -> None:
    """Write `model/` (with the corpus tokenizer) and `heads/` under temporary names; rename them when complete.

    From the first renaming on, the run counts as not finished. `weights` is the whole state dict of `model`.

    Raises:
        UserError: the files cannot be written.
    """
    output = run.path
    partial = output / SAVING
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save(partial, weights)
        save_tokenizer(run.config, shards, partial / MODEL)
    except Exception as error:  # safetensors and torch have exceptions of their own for a full disk
        raise UserError(f"{output}: cannot save the model ({first_line(error)}); free some space and rerun") from error
    fsync_tree(partial)
    run.reopen()
    for name in (MODEL, HEADS):
        shutil.rmtree(output / name, ignore_errors=True)
        (partial / name).replace(output / name)
    partial.rmdir()
    fsync(output)
