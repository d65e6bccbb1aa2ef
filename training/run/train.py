"""One training run from settings to a saved model."""

import json
import math
import shutil
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import copy_files, fsync, fsync_tree, sha256_file
from weighted_mtp.schemas.storage.locations import local_name, locate
from weighted_mtp.schemas.storage.locks import exclusive
from weighted_mtp.training.data.mixing import make_loader, mix_identity, open_mix
from weighted_mtp.training.evaluation import evaluate_model
from weighted_mtp.training.model.flops import StepFlops
from weighted_mtp.training.model.layers import checkpoint_activations, compile_layers
from weighted_mtp.training.model.mtp_model import HEADS_WEIGHTS, MTPModel, build_model, saved_heads
from weighted_mtp.training.model.trainable import add_adapters, freeze_embeddings, freeze_trunk
from weighted_mtp.training.model.trunk import choose_attention
from weighted_mtp.training.optimizer import make_optimizer
from weighted_mtp.training.run.checkpoint import TrainingState
from weighted_mtp.training.run.checks import check_model, check_same_tokenizer, check_settings, check_tokenizer
from weighted_mtp.training.run.directory import TRACKING, RunDirectory
from weighted_mtp.training.run.mirror import Mirror
from weighted_mtp.training.sharding import distribute, full_state, sharding_requested
from weighted_mtp.training.trainer import TrainingLoop
from weighted_mtp.training.weighting.stored import check_formula


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says, continuing a stopped run, and return its summary (also in `summary.json`).

    Raises:
        UserError: input, model, settings and output directory do not fit together, or training diverges.
    """
    mirror = None if isinstance(config.output, Path) else Mirror(config.output)
    path = mirror.path if mirror else config.output
    with sharding_requested(config.fsdp) as shard:
        accelerator = make_accelerator(config.dtype, log_with=list(config.trackers) or None, project_dir=str(path))
        with (
            exclusive(config.output) if accelerator.is_main_process else nullcontext(),
            closing(mirror) if mirror and accelerator.is_local_main_process else nullcontext(),
        ):
            return _train(config, accelerator, mirror, shard)


def _train(config: TrainConfig, accelerator: Accelerator, mirror: Mirror | None, shard: bool) -> dict[str, Any]:
    shards = ZippedSets.open(config.input)
    held_out = ZippedSets.open(config.eval_input) if config.eval_input else None
    mixed = open_mix(config)
    check_tokenizer(config.model, shards.first)
    for data in filter(None, (*mixed, held_out)):
        check_same_tokenizer(shards.first, data.first)
    for data in (shards, *mixed):
        check_formula(config.weights.node, data)
    longest = max(data.first.manifest.corpus.max_length for data in (shards, *mixed))
    sequence_length = config.sequence_length or longest
    config = config.model_copy(update={"sequence_length": sequence_length})
    check_settings(config, sequence_length, accelerator.num_processes)
    tokenizer = shards.first.manifest.tokenizer.fingerprint
    inputs = {
        "input": shards.digest,
        "tokenizer": tokenizer,
        "model": model_identity(config),
        **mix_identity(config, mixed),
    }
    run = RunDirectory(config, inputs, mirror, accelerator.num_processes)
    run.fetch(accelerator)
    run.check()
    if (finished := run.summary()) is not None:
        return finished | {"already_complete": True}

    set_seed(config.seed)
    attention = choose_attention(config.attention, accelerator.device)
    mtp_model = build_model(config.model, config.heads, from_scratch=config.from_scratch, attention=attention)
    for data in filter(None, (shards, *mixed, held_out)):
        check_model(mtp_model, config.model, data.first, sequence_length)
    if config.trainable == "heads":
        freeze_trunk(mtp_model.trunk)
    elif config.trainable == "lora":
        add_adapters(mtp_model.trunk, config.lora)
    if config.heads.dmtd.cycle > 1 and not config.from_scratch:
        freeze_embeddings(mtp_model.trunk)
    set_seed(config.seed, device_specific=True)  # dropout differs between processes
    loader = make_loader(config, shards, mixed, sequence_length)
    steps = config.max_steps or math.ceil(config.epochs * loader.rows_per_epoch() / config.batch_size)
    flops = StepFlops(mtp_model)
    model = place_model(accelerator, mtp_model, config, shard=shard)
    optimizer, scheduler = make_optimizer(mtp_model, config.optimizer, steps)
    loop = TrainingLoop(accelerator, config, model, optimizer, scheduler, loader, flops, steps)
    state = TrainingState(mtp_model, optimizer, scheduler, {"loop": loop}, config.seed)
    run.load_checkpoint(accelerator, state)
    if accelerator.is_main_process:
        run.claim(loop.step)
    accelerator.init_trackers(TRACKING, config={"config": json.dumps(config.model_dump(mode="json"))})

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
        metrics = {f"eval_loss_{head.part}": head.loss for head in losses}
        return metrics | {f"eval_accuracy_{head.part}": head.accuracy for head in losses}

    checkpoint_every = config.checkpoint_every or max(1, steps // 10)
    for metrics in loop.run():
        if config.eval_every and loop.step % config.eval_every == 0 and loop.step < steps:
            metrics |= evaluate()
        if metrics:
            accelerator.log(metrics, step=loop.step)
            if accelerator.is_main_process:
                run.log({"step": loop.step} | metrics)
        if loop.step % checkpoint_every == 0 or loop.step == steps:
            loop.prepare_checkpoint()
            run.save_checkpoint(accelerator, state, loop.step)

    left_out = loop.window.counters["bad_steps"] + loop.window.counters["no_signal_steps"]
    if left_out >= steps:
        raise UserError(
            f"--weights: none of the {steps} steps had a target with weight and a "
            "finite loss, so nothing was learnt; choose other weights and another --output"
        )
    evaluation = evaluate()
    summary = {
        "steps": loop.step,
        "tokens": loop.tokens,
        "seconds": loop.seconds,
        "tokens_per_second": loop.tokens / loop.seconds,
        "loss": loop.metrics["loss"],
        "selected_share": loop.metrics["selected_share"],
        "memory_gib": loop.metrics["memory_gib"],
        **loop.window.counters,
        **evaluation,
    }
    accelerator.log(evaluation, step=loop.step)
    weights = full_state(accelerator, mtp_model)
    if weights is not None:
        save_model(mtp_model, weights, shards.first, run.path)
        if evaluation:
            run.log({"step": loop.step} | evaluation)
        run.finish(summary)
    accelerator.wait_for_everyone()  # a process that leaves early takes the group down under the others
    accelerator.end_training()
    return summary


def make_accelerator(dtype: str, **kwargs: Any) -> Accelerator:
    """An Accelerator whose compute type is `dtype`: auto is bfloat16 on a GPU and float32 on a CPU."""
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available())
    return Accelerator(
        mixed_precision="bf16" if bfloat16 else "no",
        cpu=not torch.accelerator.is_available(),  # unless told so, processes on CPUs would not know of each other
        **kwargs,
    )


def place_model(accelerator: Accelerator, model: MTPModel, config: TrainConfig, *, shard: bool) -> nn.Module:
    """Do to the model's layers what the settings say, and bring it to the devices."""
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_layers(model)
    return distribute(accelerator, model, shard=shard)


def model_identity(config: TrainConfig) -> str:
    """What a continued run must find under --model: a fingerprint of a directory, else the hub id."""
    if saved_heads(config.model) is not None:
        run = locate(config.model)
        trunk = config.model_copy(update={"model": str(run / "model")})
        return f"{model_identity(trunk)},{sha256_file(run / 'heads' / HEADS_WEIGHTS)}"
    directory = Path(local_name(config.model))
    if not directory.is_dir():
        return config.model
    if config.from_scratch and (directory / "config.json").exists():
        return sha256_file(directory / "config.json")
    return model_fingerprint(directory, locate(config.model))


def save_model(model: MTPModel, weights: dict[str, Tensor], shards: ShardSet, output: Path) -> None:
    """Write `model/` (with the corpus's tokenizer) and `heads/` into the run, named only when they are complete.

    `weights` is the whole state dict of `model`.

    Raises:
        UserError: the files cannot be written.
    """
    partial = output / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save(partial, weights)
    except Exception as error:  # safetensors and torch have their own for a full disk
        raise UserError(f"{output}: cannot save the model ({first_line(error)}); free some space and rerun") from error
    copy_files(shards.tokenizer_path, partial / "model")
    fsync_tree(partial)
    for name in ("model", "heads"):
        shutil.rmtree(output / name, ignore_errors=True)
        (partial / name).replace(output / name)
    partial.rmdir()
    fsync(output)
