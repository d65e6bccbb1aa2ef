"""The weights of a scheme outside a training run."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from weighted_mtp.schemas.configs import WeightsConfig
from weighted_mtp.schemas.configs.common import Seed
from weighted_mtp.schemas.errors import UserError, first_line
from weighted_mtp.schemas.shard_set.shards import list_lengths
from weighted_mtp.schemas.shard_set.zipped import SomeSets, ZippedSets
from weighted_mtp.schemas.text import printable, shortened
from weighted_mtp.schemas.weights.nodes import waits_for_batch
from weighted_mtp.schemas.weights.presets import PRESETS
from weighted_mtp.training.weighting.stored import Weighting, make_weighting

SomeWeights = WeightsConfig | Mapping[str, Any] | str
"""A weighting scheme: its settings, the same as a dict, or the name of a preset."""

SEED = TypeAdapter[int](Seed)


def token_weights(sets: SomeSets, weights: SomeWeights = "uniform", *, seed: int = 0) -> Iterator[np.ndarray]:
    """Iterate over the weights of all sequences in stored order, with one row group in memory.

    The weights are those that `wmtp train` gives to these tokens as targets. The first weight of a sequence has no
    effect there, because nothing predicts the first token.

    Args:
        sets: a shard set, or several with the same rows.
        weights: the scheme.
        seed: seed of random controls, as in training.

    Returns:
        An iterator of (T,) float32 for each sequence of T tokens, 0 for tokens without a score.

    Raises:
        UserError: the sets cannot be opened or lack a column, the weights need a model, a batch or a run, or the seed
            is none.
    """
    config = choose_weights(weights)
    try:
        seed = SEED.validate_python(seed)
    except ValidationError as error:
        raise UserError(f"seed: {first_line(error)}") from error
    if waits_for_batch(config.node):
        raise UserError(f"weights: '{config.text}' ranks tokens within a batch; use packed_rows, or by=corpus")
    shards = ZippedSets.of(sets)
    return _iterate(shards, make_weighting(config, shards), seed)


def _iterate(shards: ZippedSets, weighting: Weighting, seed: int) -> Iterator[np.ndarray]:
    for shard, row_group in shards.first.manifest.row_groups():
        table = shards.read(shard, weighting.columns, row_group)
        weights = weighting.weigh(table, np.random.default_rng([seed, shard, row_group]))
        ends = np.cumsum(list_lengths(table["input_ids"]))
        for of_sequence in np.split(weights, ends[:-1]):
            yield of_sequence.copy()  # a view would keep all sequences in memory


def choose_weights(weights: SomeWeights) -> WeightsConfig:
    """The settings of a scheme that needs no run.

    Raises:
        UserError: invalid settings, or weights that depend on the model or the step.
    """
    if isinstance(weights, str) and weights not in PRESETS:
        raise UserError(
            f"weights: no preset '{printable(shortened(weights))}'; choose from {', '.join(PRESETS)}, or give a "
            "formula as {'formula': '...'}"
        )
    if not isinstance(weights, WeightsConfig):
        try:
            weights = WeightsConfig.model_validate({"preset": weights} if isinstance(weights, str) else weights)
        except ValidationError as error:
            raise UserError(f"weights: {first_line(error)}") from error
    if weights.is_live:
        raise UserError(
            f"weights: '{weights.text}' depends on the loss of the model in training; use stored columns, or train()"
        )
    if weights.warmup_ratio:
        raise UserError("weights: warmup_ratio needs the number of steps of a run; leave it out, or use train()")
    return weights
