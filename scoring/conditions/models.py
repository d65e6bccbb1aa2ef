"""Scoring models: find a checkpoint and check that it fits the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.pretrained import (
    check_code,
    check_complete,
    load_config,
    load_error,
    load_tokenizer,
    most_positions,
    quiet_transformers,
)
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.locations import (
    Location,
    is_address,
    is_missing_directory,
    local_copy,
    locate,
    resolve,
)
from weighted_mtp.schemas.storage.training_run import trained_model
from weighted_mtp.schemas.tokenizers import fits
from weighted_mtp.scoring.engines.architectures import architectures, is_causal_lm, is_recurrent

CHECKPOINT_FILES = ["*.json", "*.model", "*.txt", "*.safetensors"]


@dataclass(frozen=True)
class ScoringModel:
    """A checkpoint that passed all checks.

    Attributes:
        name: name given by the user; for a training run, its `model` directory.
        source: address or absolute path of its files.
        fingerprint: identity of weights and config.
        max_length: maximum sequence length; None if unlimited.
        revision: commit of a model from the hub.
        recurrent: whether the model has a recurrent state in addition to the key-value cache.
        parameters: number of parameters; 0 if unknown.
        vocab_size: number of its token ids.
    """

    name: str
    source: Location
    fingerprint: str
    max_length: int | None
    revision: str | None = None
    recurrent: bool = False
    parameters: int = 0
    vocab_size: int = 0

    @property
    def directory(self) -> Path:
        """Local directory of the files, downloaded from a store if necessary."""
        return local_copy(self.source)


def check_model(name: str, flag: str, shards: ShardSet, *, trust_remote_code: bool = False) -> ScoringModel:
    """Find a model, download it if necessary, and check it against the corpus's tokenizer.

    Args:
        name: directory, address or id; `id@revision` for a branch, tag or commit. A finished training run is the
            checkpoint in its `model` directory.
        flag: command line flag of this model, for messages.
        shards: the corpus.
        trust_remote_code: whether Python code of the model may run.

    Raises:
        UserError: not found, not a causal language model, no weights, a tokenizer that does not fit the corpus, or a
            training run that is not finished.
    """
    logging.set_verbosity_error()
    location: Location = locate(name)
    if (trained := trained_model(location, flag)) is not None:
        name, location = str(trained), trained
    from_hub = not is_address(name) and not location.is_dir()
    source = download(name, flag, trust_remote_code) if from_hub else resolve(location)
    directory = local_copy(source)
    fingerprint = model_fingerprint(directory, source, code=trust_remote_code)
    config = check_config(directory, f"{flag} {name}", trust_remote_code)
    check_tokenizer(directory, f"{flag} {name}", shards, trust_remote_code)
    parameters = check_weights(directory, f"{flag} {name}", trust_remote_code)
    text_config = config.get_text_config()
    return ScoringModel(
        name=name,
        source=source,
        fingerprint=fingerprint,
        max_length=most_positions(config),
        revision=directory.name if from_hub else None,
        recurrent=is_recurrent(config),
        parameters=parameters,
        vocab_size=text_config.vocab_size,
    )


def download(name: str, flag: str, code: bool) -> Path:
    """Directory of a snapshot in the Hugging Face cache, named by its commit. Downloaded if missing.

    Its Python files are needed only if its `code` may run.
    """
    if is_missing_directory(name):
        raise UserError(f"{flag} {name}: no such directory; check the path")
    repository, _, revision = name.partition("@")
    patterns = [*CHECKPOINT_FILES, *["*.py"] * code]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns)).resolve()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{flag} {name}: no such directory, and not available from the Hugging Face hub or its local cache; "
            "check the name, the revision and the connection"
        ) from error


def check_config(directory: Path, name: str, trust_remote_code: bool) -> Any:
    """Config of a checkpoint; raise UserError unless it is a causal language model."""
    config = load_config(name, directory, trust_remote_code=trust_remote_code)
    if not is_causal_lm(config):
        raise UserError(f"{name}: {architectures(config)[0]} is not a causal language model; use another model")
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise UserError(f"{name}: config.json has no vocab_size; restore the checkpoint")
    return config


def check_tokenizer(directory: Path, name: str, shards: ShardSet, trust_remote_code: bool) -> None:
    """Raise UserError unless the checkpoint has a tokenizer that fits the corpus."""
    problem, remedy = f"{name}: has no usable tokenizer", "save the tokenizer with it"
    tokenizer = load_tokenizer(directory, problem, remedy, trust_remote_code=trust_remote_code)
    if not fits(tokenizer, shards):
        raise UserError(
            f"{name}: its tokenizer differs from the corpus's ({shards.manifest.tokenizer.name}); token losses are "
            "comparable only between models that share the corpus's tokenizer: use one, or prepare the corpus with "
            "this tokenizer"
        )


def check_weights(directory: Path, name: str, trust_remote_code: bool) -> int:
    """Check that the checkpoint has every weight of its architecture, in its shape; return the number of parameters.

    Engines fill missing weights with random numbers or uninitialised memory. Quantised checkpoints are not checked
    and return 0, because listing their weights requires the quantisation packages.

    Raises:
        UserError: a weight is missing or has another shape, or the files cannot be read.
    """
    if getattr(load_config(name, directory, trust_remote_code=trust_remote_code), "quantization_config", None):
        return 0
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                device_map="meta",
                attn_implementation=None,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # libraries raise various exceptions for damaged files
        raise load_error(error, directory, f"{name}: its weights cannot be read", "restore the checkpoint") from error
    check_code(name, directory, model)
    check_complete(name, report, model)
    return model.num_parameters()


def check_sequences(model: ScoringModel, flag: str, shards: ShardSet, prompt: Sequence[int] = ()) -> None:
    """Raise UserError unless a model accepts the ids and the lengths of all sequences after a prompt of these ids."""
    if not shards.fits_ids(model.vocab_size) or max(prompt, default=0) >= model.vocab_size:
        raise UserError(
            f"{flag}: {model.name} has {model.vocab_size} token ids, but the corpus has the id "
            f"{max((shards.largest_id, *prompt))}; use a model made for its tokenizer"
        )
    longest = shards.manifest.longest
    if model.max_length is None or longest + len(prompt) <= model.max_length:
        return
    limit = f"{flag}: {model.name} reads at most {model.max_length} tokens, but the corpus has a sequence of {longest}"
    if not prompt:
        raise UserError(f"{limit}; rerun 'wmtp prepare' with --max_length {model.max_length}")
    raise UserError(
        f"{limit} and the prompt has {len(prompt)}; shorten the prompt, or the sequences with 'wmtp prepare'"
    )
