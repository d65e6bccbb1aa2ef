"""Checks before training that settings, model, shard sets and devices are compatible."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.configs.common import RowLength
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import (
    NATIVE_HEADS,
    load_config,
    load_tokenizer,
    most_positions,
    native_heads,
    native_weights,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import read_json_file
from weighted_mtp.schemas.storage.locations import Location, local_name, locate
from weighted_mtp.schemas.storage.training_run import RUN_RECORD, trained_model
from weighted_mtp.schemas.tokenizers import fits
from weighted_mtp.training.data.loader import check_batch
from weighted_mtp.training.model.mtp_model import MTPModel
from weighted_mtp.training.run.preconditions import check_optimizer, check_trackers


def check_settings(config: TrainConfig, sequence_length: int, processes: int) -> None:
    """Check settings against the number of processes, the row length and the installed packages.

    Raises:
        UserError: a batch cannot be split or is too large, an offset exceeds the row length, or the package of a
            tracker or of the optimizer is not installed.
    """
    if config.batch_size % processes:
        raise UserError(f"--batch_size {config.batch_size}: give a multiple of the {processes} processes")
    check_batch(config.batch_size, sequence_length, "--batch_size")
    if config.heads.dmtd.cycle > sequence_length:
        raise UserError(f"--heads.dmtd.cycle {config.heads.dmtd.cycle}: longer than rows of {sequence_length} tokens")
    if config.heads.offsets[-1] >= sequence_length:
        raise UserError(f"--heads.offsets: {config.heads.offsets[-1]} reaches beyond rows of {sequence_length} tokens")
    check_trackers(config.trackers)
    check_optimizer(config.optimizer.kind)


def check_tokenizer(model: str, shards: ShardSet, *, trust_remote_code: bool) -> None:
    """Check that the tokenizer of a model fits a corpus. Accepts a model directory without a tokenizer.

    Raises:
        UserError: it splits text differently, it has other tokens for ids of the corpus, or it cannot be loaded.
    """
    record = run_record(locate(model))
    if record is not None and record["inputs"]["tokenizer"] == shards.manifest.tokenizer.fingerprint:
        return
    tokenizer = model_tokenizer(model, trust_remote_code=trust_remote_code)
    if tokenizer is not None and not fits(tokenizer, shards):
        raise UserError(
            f"--model {model}: its tokenizer is not that of {shards.path} ({shards.manifest.tokenizer.name}); "
            "prepare the corpus with this model's tokenizer"
        )


def model_tokenizer(model: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model or a finished run; None for a directory without one.

    Raises:
        UserError: it cannot be loaded.
    """
    trained = trained_model(locate(model), "--model")
    source = local_name(model if trained is None else str(trained))
    is_directory = Path(source).is_dir()
    if is_directory and not any(Path(source).glob("tokenizer*.json")):
        return None
    load_config(f"--model {model}", source, trust_remote_code=trust_remote_code)  # loading the tokenizer reads it, too
    problem = f"--model {model}: its tokenizer cannot be loaded"
    remedy = "restore it" if is_directory else "check the name, or use a directory"
    return load_tokenizer(source, problem, remedy, trust_remote_code=trust_remote_code)


def run_record(place: Location) -> dict[str, Any] | None:
    """The record (`run.json`) of a training run; None for any other model.

    Raises:
        UserError: the run is not finished, or its record is damaged.
    """
    if trained_model(place, "--model") is None:
        return None
    record = read_json_file(place / RUN_RECORD)
    try:
        TypeAdapter(RowLength).validate_python(record["config"]["sequence_length"], strict=True)
        TypeAdapter(str).validate_python(record["inputs"]["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place / RUN_RECORD}: is not the record of a training run; restore it") from error
    return record


def check_native_heads(model: MTPModel, config: TrainConfig) -> None:
    """Check that training would not lose multi-token-prediction layers of a checkpoint, which transformers ignores.

    Raises:
        UserError: the config announces such layers, or the checkpoint has them.
    """
    loss = "multi-token-prediction layers of its own, which training would not save"
    if native := native_heads(model.trunk.config):
        announced = [name for name in NATIVE_HEADS if getattr(model.trunk.config.get_text_config(), name, None)]
        raise UserError(
            f"--model {config.model}: announces {native} {loss}; "
            f"set {' and '.join(announced)} to 0 in a copy of its config.json to train without them"
        )
    if not config.from_scratch and (weights := native_weights(local_name(config.model))):
        raise UserError(
            f"--model {config.model}: has {loss} ({weights[0]}); to train without them, load it with "
            "AutoModelForCausalLM, and train the copy that save_pretrained writes"
        )


def check_model(model: MTPModel, name: str, shards: ShardSet, sequence_length: int) -> None:
    """Check that a model has enough embeddings for the token ids and enough positions for the sequences.

    Raises:
        UserError: the model is too small for the shard set.
    """
    size = model.trunk.get_output_embeddings().weight.shape[0]
    if not shards.fits_ids(size):
        raise UserError(
            f"--model {name}: has only {size} embeddings, but {shards.path} has the token id {shards.largest_id}; "
            "use a model made for its tokenizer"
        )
    if (furthest := model.heads_config.offsets[-1]) >= sequence_length:
        raise UserError(
            f"--model {name}: has a head {furthest} tokens ahead, which rows of {sequence_length} tokens are too short "
            f"for; give --sequence_length {furthest + 1} or more"
        )
    chunk = getattr(model.trunk.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and chunk < sequence_length:
        raise UserError(
            f"--model {name}: its attention has chunks of {chunk} tokens, which would start in rows and not in "
            f"documents; give --sequence_length {chunk}"
        )
    positions = most_positions(model.trunk.config)
    longest = min(sequence_length, shards.manifest.longest)
    if positions is not None and positions < longest:
        raise UserError(
            f"--model {name}: reads at most {positions} tokens, but {shards.path} has sequences of up to {longest}; "
            f"give --sequence_length {positions}, or prepare with --max_length {positions}"
        )
