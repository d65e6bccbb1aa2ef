"""How much losses depend on each token: the transformers engine against autograd and against finite differences."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.value_counts import FLOAT16_MAX
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement
from weighted_mtp.scoring.conditions.prompts import Prompt
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine
from weighted_mtp.scoring.job.scorer import measure

BOTH = ("loss", "gradient")
BOS = 256


def engine(model: Path, batch_tokens: int = 8192, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(model, EngineConfig("transformers", None, dtype, batch_tokens, 256, threads=1))


def plain_gradient(model: torch.nn.Module, ids: list[int], first: int) -> np.ndarray:
    """Norms of the gradient of the summed losses from position `first` on, with respect to all input embeddings."""
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0]
    F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="sum").backward()
    return embeddings.grad[0].norm(dim=-1).numpy()


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.int32) for length in (40, 1, 100, 2, 33, 100)]


def test_gradients_equal_autograd_on_one_sequence_at_a_time(reference_model, sequences):
    """Whatever else is in the batch, and however far a sequence is padded."""
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    for batch_tokens in (8192, 1):
        results = engine(reference_model, batch_tokens).score([Request(ids, 0, BOTH) for ids in sequences])
        for (losses, gradients), ids in zip(results, sequences, strict=True):
            assert np.isnan(losses[0])
            assert np.isnan(gradients[0])
            if len(ids) == 1:
                continue
            expected = plain_gradient(model, ids.tolist(), 1)
            np.testing.assert_allclose(gradients[1:], expected[1:], rtol=1e-4, atol=1e-6)
            assert gradients[-1] == 0, "the last token comes before nothing"
            assert (gradients[1:-1] > 0).all()


def test_losses_are_the_same_with_and_without_gradients(reference_model, sequences):
    loaded = engine(reference_model)
    with_gradients = loaded.score([Request(ids, 0, ("gradient", "loss", "entropy")) for ids in sequences])
    without = loaded.score([Request(ids, 0, ("loss", "entropy")) for ids in sequences])
    for one, other in zip(with_gradients, without, strict=True):
        np.testing.assert_allclose(one[1:], other, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())


def test_only_sequences_that_want_gradients_take_a_backward_pass(reference_model, sequences):
    """Whatever fits into a batch with them."""
    loaded = engine(reference_model)
    kept: list[tuple[int, bool]] = []

    def keep(module: torch.nn.Module, args: object, kwargs: object, output: object) -> None:
        kept.append((len(output.logits), output.logits.requires_grad))

    loaded.model.register_forward_hook(keep, with_kwargs=True)
    wanted = [("loss",), BOTH, ("loss", "entropy"), ("loss",), BOTH, ("entropy",)]
    requests = [Request(ids, 0, quantities) for ids, quantities in zip(sequences, wanted, strict=True)]
    together = loaded.score(requests)
    assert kept[0] == (2, True), "what takes the most memory comes first"
    assert kept[1:] == [(2, False), (2, False)]
    for request, scores in zip(requests, together, strict=True):
        (alone,) = loaded.score([request])
        np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-5)


def test_gradients_equal_finite_differences(make_model):
    """Without layers a token only reaches the prediction of the next: in NumPy, in float64."""
    path = make_model(seed=4, num_hidden_layers=0)
    weights = {
        name: tensor.double().numpy()
        for name, tensor in AutoModelForCausalLM.from_pretrained(path).state_dict().items()
    }
    ids = np.array([7, 3, 250, 3], np.int32)

    def next_loss(embedding: np.ndarray, target: int) -> float:
        normed = weights["model.norm.weight"] * embedding / np.sqrt((embedding**2).mean() + 1e-6)
        logits = weights["lm_head.weight"] @ normed
        return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])

    step = 1e-6
    expected = []
    for position in range(1, len(ids) - 1):
        at = weights["model.embed_tokens.weight"][ids[position]]
        slopes = [
            (next_loss(at + step * axis, ids[position + 1]) - next_loss(at - step * axis, ids[position + 1]))
            / (2 * step)
            for axis in np.eye(len(at))
        ]
        expected.append(np.linalg.norm(slopes))
    [[gradients]] = engine(path).score([Request(ids, 0, ("gradient",))])
    np.testing.assert_allclose(gradients[1:], [*expected, 0], rtol=1e-4)


def test_after_a_prompt_only_losses_of_the_sequence_count(reference_model, sequences):
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    scoring_model, prompt = ScoringModel("m", reference_model, "1", 256), Prompt("abc", (1, 2, 3))
    wanted = [Measurement(scoring_model, quantity="gradient", prompt=prompt)]
    with_bos = np.concatenate([[BOS], sequences[0]]).astype(np.int32)
    plain, started = measure(engine(reference_model), [sequences[0], with_bos], wanted, BOS)
    np.testing.assert_allclose(
        plain[0], plain_gradient(model, [1, 2, 3, *sequences[0].tolist()], 3)[3:], rtol=1e-4, atol=1e-6
    )
    expected = plain_gradient(model, [BOS, 1, 2, 3, *sequences[0].tolist()], 4)[4:]
    assert np.isnan(started[0, 0])
    np.testing.assert_allclose(started[0, 1:], expected, rtol=1e-4, atol=1e-6)


def test_gradients_beyond_float16_are_clipped(make_model):
    path = make_model(seed=4, num_hidden_layers=0)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.embed_tokens.weight.data *= 1e-6
    model.model.norm.weight.data *= 100
    model.save_pretrained(path)
    (scores,) = engine(path).score([Request(np.array([7, 3, 250], np.int32), 0, ("gradient",))])
    assert scores[0, 1:].tolist() == [FLOAT16_MAX, 0]


@pytest.fixture
def config(
    make_shard_set: Callable[..., ShardSet], sequences: list[np.ndarray], reference_model: Path, tmp_path: Path
) -> Callable[..., ScoreConfig]:
    tokens = make_shard_set([ids.tolist() for ids in sequences], rows_per_shard=4, name="tokens")

    def make(**settings: object) -> ScoreConfig:
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "reference": str(reference_model)}
        return ScoreConfig.model_validate(defaults | {"engine": "transformers", "gradient": True} | settings)

    return make


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
        with pytest.raises(UserError, match="--gradient: vLLM computes no gradients; add --engine transformers"):
            run(config(engine=name))
