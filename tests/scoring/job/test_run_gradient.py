"""Gradients in a scoring run: after a prompt, as a column, and with vLLM."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from plain_gradients import plain_gradient
from transformers import AutoModelForCausalLM

from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement
from weighted_mtp.scoring.conditions.prompts import Prompt
from weighted_mtp.scoring.engines.base import EngineConfig
from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine
from weighted_mtp.scoring.job.scorer import measure

BOS = 256


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.int32) for length in (40, 1, 100, 2, 33, 100)]


@pytest.fixture
def config(
    make_shard_set: Callable[..., ShardSet], sequences: list[np.ndarray], reference_model: Path, tmp_path: Path
) -> Callable[..., ScoreConfig]:
    tokens = make_shard_set([ids.tolist() for ids in sequences], rows_per_shard=4, name="tokens")

    def make(**settings: object) -> ScoreConfig:
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "reference": str(reference_model)}
        return ScoreConfig.model_validate(defaults | {"engine": "transformers", "gradient": True} | settings)

    return make


def test_after_a_prompt_only_losses_of_the_sequence_count(reference_model, sequences):
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    scoring_model, prompt = ScoringModel("m", reference_model, "1", 256), Prompt("abc", (1, 2, 3))
    wanted = [Measurement(scoring_model, quantity="gradient", prompt=prompt)]
    with_bos = np.concatenate([[BOS], sequences[0]]).astype(np.int32)
    engine = TransformersEngine(reference_model, EngineConfig("transformers", None, "float32", 8192, 256, threads=1))
    plain, started = measure(engine, [sequences[0], with_bos], wanted, BOS)
    np.testing.assert_allclose(
        plain[0], plain_gradient(model, [1, 2, 3, *sequences[0].tolist()], 3)[3:], rtol=1e-4, atol=1e-6
    )
    expected = plain_gradient(model, [BOS, 1, 2, 3, *sequences[0].tolist()], 4)[4:]
    assert np.isnan(started[0, 0])
    np.testing.assert_allclose(started[0, 1:], expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_a_column(config, score_here, reference_model, sequences, tmp_path):
    scored = run(config())
    assert list(scored.manifest.columns) == ["loss_reference", "gradient_reference"]
    origin = scored.manifest.columns["gradient_reference"].origin
    assert origin.quantity == "gradient"
    assert origin.describe().startswith(f"gradient, {reference_model}, full context")
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    first = scored.read(0)["gradient_reference"].to_pylist()
    np.testing.assert_allclose(first[2][1:], plain_gradient(model, sequences[2].tolist(), 1)[1:], rtol=2.0**-10)
    conditions = {"mine": {"model": str(reference_model), "prompt": "x", "gradient": True}}
    more = run(config(input=scored.path, output=tmp_path / "more", conditions=conditions))
    assert list(more.manifest.columns)[2:] == ["loss_mine", "gradient_mine"]


def test_vllm_computes_none(request, config):
    request.getfixturevalue("vllm_installed")
    for name in ("vllm", "auto"):
        with pytest.raises(UserError, match="--gradient: vLLM computes no gradients; use --engine transformers"):
            run(config(engine=name))
