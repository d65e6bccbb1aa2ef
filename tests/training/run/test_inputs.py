"""Shard sets and model of a run, opened and identified without training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weighted_mtp.schemas.configs import HeadsConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import sha256_file
from weighted_mtp.training.model.mtp_model import build_model
from weighted_mtp.training.run.inputs import model_identity, open_inputs

LONGEST = 120


def test_rows_are_as_long_as_the_longest_sequences_of_input_and_mix(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """The held-out set does not count."""
    inputs = open_inputs(config("run", sequence_length=None, eval_input=scored_set([128], name="long").path), 1)
    assert inputs.sequence_length == inputs.config.sequence_length == LONGEST
    mix = {str(scored_set([125], name="longer").path): 0.5}
    assert open_inputs(config("run", sequence_length=None, mix=mix), 1).sequence_length == 125
    assert open_inputs(config("run"), 1).sequence_length == 64


def test_identity_names_everything_that_training_reads(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    plain = open_inputs(config("run", eval_input=None), 1)
    assert plain.held_out is None
    tokenizer = plain.shards.first.manifest.tokenizer.fingerprint
    model = model_fingerprint(Path(plain.config.model))
    identity = {"input": plain.shards.digest, "tokenizer": tokenizer, "model": model}
    assert plain.identity() == identity
    other = scored_set([40, 50], name="other")
    mixed = open_inputs(config("run", mix={str(other.path): 0.25}), 1)
    assert mixed.identity() == identity | {"mix": f"0.25 {other.manifest.digest}"}


def test_a_held_out_set_without_targets_is_refused_before_training(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    with pytest.raises(UserError, match="/short: no sequence has two tokens, so there is nothing to predict"):
        open_inputs(config("run", eval_input=scored_set([1, 1], name="short").path), 1)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({}, 3, "--batch_size 4: give a multiple of the 3 processes"),
        ({"batch_size": 10**9, "sequence_length": 16}, 1, "--batch_size 1000000000: .* so give at most 16777216"),
        ({"sequence_length": None, "heads": {"offsets": (1, LONGEST)}}, 1, "120 reaches beyond rows of 120 tokens"),
        ({"weights": {"formula": "loss_other"}}, 1, "no column 'loss_other'"),
    ],
)
def test_settings_that_do_not_fit_the_sets(
    settings: dict, processes: int, message: str, config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        open_inputs(config("run", **settings), processes)


def test_a_model_is_its_files_or_its_name(config: Callable[..., TrainConfig]) -> None:
    directory = Path(config("run").model)
    assert model_identity(config("run", model="org/name")) == "org/name"
    assert model_identity(config("run")) == model_fingerprint(directory)
    assert model_identity(config("run", from_scratch=True)) == sha256_file(directory / "config.json")


def test_a_run_is_its_trunk_and_its_heads(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model = build_model(config("run").model, HeadsConfig(offsets=(1, 2)), from_scratch=False)
    model.save(tmp_path / "first")
    run = config("second", model=str(tmp_path / "first"))
    trunk, heads = model_identity(run).split(",")
    assert trunk == model_fingerprint(tmp_path / "first" / "model")
    with torch.no_grad():
        next(model.heads.parameters()).add_(1)
    model.save(tmp_path / "other")
    other_trunk, other_heads = model_identity(config("second", model=str(tmp_path / "other"))).split(",")
    assert other_trunk == trunk
    assert other_heads != heads
