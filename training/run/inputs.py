"""The inputs of a training run: opened and checked shard sets, and resolved settings."""

import math
from dataclasses import dataclass
from pathlib import Path

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.zipped import ZippedSets
from weighted_mtp.schemas.storage.files import sha256_file
from weighted_mtp.schemas.storage.locations import local_name, locate
from weighted_mtp.schemas.storage.training_run import HEADS, MODEL
from weighted_mtp.schemas.tokenizers import check_same_tokenizer
from weighted_mtp.training.data.loader import check_targets
from weighted_mtp.training.data.mixing import mix_identity, open_mix
from weighted_mtp.training.model.mtp_model import HEADS_WEIGHTS, MTPModel, saved_heads
from weighted_mtp.training.run.compatibility import check_model, check_native_heads, check_settings, check_tokenizer
from weighted_mtp.training.run.preconditions import resolve_length
from weighted_mtp.training.weighting.stored import check_formula


@dataclass(frozen=True)
class RunInputs:
    """Settings and shard sets of a run.

    Attributes:
        config: the settings, with `sequence_length` resolved.
        sequence_length: tokens per packed row.
        shards: the sets in --input.
        mixed: the sets in --mix.
        held_out: the sets in --eval_input, or None.
    """

    config: TrainConfig
    sequence_length: int
    shards: ZippedSets
    mixed: list[ZippedSets]
    held_out: ZippedSets | None

    def identity(self) -> dict[str, str]:
        """Digests of all training inputs, to compare when a run is resumed."""
        return {
            "input": self.shards.digest,
            "tokenizer": self.shards.first.manifest.tokenizer.fingerprint,
            "model": model_identity(self.config),
            **mix_identity(self.config, self.mixed),
        }

    def check_fit(self, model: MTPModel) -> None:
        """Check that the model fits the settings and all sets.

        Raises:
            UserError: it has multi-token-prediction layers of its own, or does not fit a set.
        """
        check_native_heads(model, self.config)
        for data in filter(None, (self.shards, *self.mixed, self.held_out)):
            check_model(model, self.config.model, data.first, self.sequence_length)

    def scheduled_steps(self, rows_per_epoch: float) -> int:
        """Steps of the learning rate schedule: those of the settings, else those of all epochs."""
        return self.config.max_steps or math.ceil(self.config.epochs * rows_per_epoch / self.config.batch_size)


def open_inputs(config: TrainConfig, processes: int) -> RunInputs:
    """Open the shard sets, check them against each other and the settings, and resolve the settings.

    Raises:
        UserError: a set cannot be opened, the held-out set has no targets, or sets and settings are incompatible.
    """
    shards = ZippedSets.open(config.input)
    held_out = ZippedSets.open(config.eval_input) if config.eval_input else None
    mixed = open_mix(config.mix)
    check_tokenizer(config.model, shards.first, trust_remote_code=config.trust_remote_code)
    if held_out is not None:
        check_targets(held_out.first)
    for data in filter(None, (*mixed, held_out)):
        check_same_tokenizer(shards.first, data.first)
    for data in (shards, *mixed):
        check_formula(config.weights.node, data)
    config = resolve_length(config, (shards, *mixed))
    assert config.sequence_length is not None
    check_settings(config, config.sequence_length, processes)
    return RunInputs(config, config.sequence_length, shards, mixed, held_out)


def model_identity(config: TrainConfig) -> str:
    """Identity of --model, to compare when a run is resumed: the fingerprint of a directory, else the hub id."""
    if saved_heads(config.model) is not None:
        run = locate(config.model)
        trunk = config.model_copy(update={"model": str(run / MODEL)})
        return f"{model_identity(trunk)},{sha256_file(run / HEADS / HEADS_WEIGHTS)}"
    directory = Path(local_name(config.model))
    if not directory.is_dir():
        return config.model
    if config.from_scratch and (directory / "config.json").exists():
        return sha256_file(directory / "config.json")
    return model_fingerprint(directory, locate(config.model), code=config.trust_remote_code)
