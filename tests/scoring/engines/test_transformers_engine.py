"""The transformers engine against the definition of a loss, autograd and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_gradients import plain_gradient
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CTRLConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    RobertaConfig,
)

from weighted_mtp.schemas.shard_set.rounding import FLOAT16_MAX
from weighted_mtp.scoring.engines import logits
from weighted_mtp.scoring.engines.base import EngineConfig, Request
from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine, batches

TOLERANCE = 1e-4
BOTH = ("loss", "gradient")
SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def engine(model: Path, batch_tokens: int = 8192, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(model, EngineConfig("transformers", None, dtype, batch_tokens, 256, threads=1))


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.int32) for length in (40, 1, 100, 2, 33, 100)]


def test_logits_are_the_models_own(tmp_path, sequences, loop_losses):
    """Gemma 2 caps its logits after the output layer; a loss from hidden states and weights alone would miss that.

    It also caps its attention scores, which `sdpa` leaves out.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = Gemma2Config(
        **sizes, **heads, final_logit_softcapping=2.0, initializer_range=0.5, attn_logit_softcapping=5.0
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    [[losses]] = engine(tmp_path).score([Request(sequences[0])])
    np.testing.assert_allclose(losses, loop_losses(model, sequences[0]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("quantities", [("loss",), BOTH])
def test_long_and_short_factors_of_longrope_follow_each_sequence(quantities, tmp_path, sequences):
    """Not the longest sequence of a batch."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "rope_theta": 10.0}
    config = Phi3Config(
        **SIZES, initializer_range=0.5, original_max_position_embeddings=33, rope_parameters=rope, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    found = engine(tmp_path).score([Request(ids, quantities=quantities) for ids in sequences])
    for (losses, *_), ids in zip(found, sequences, strict=True):
        with torch.no_grad():
            logits_alone = model(torch.from_numpy(ids)[None].long()).logits[0, :-1]
        alone = F.cross_entropy(logits_alone, torch.from_numpy(ids[1:]).long(), reduction="none")
        np.testing.assert_allclose(losses[1:], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, intermediate_size=64),
        GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2),
        MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=2),
        GraniteConfig(**SIZES, intermediate_size=64, logits_scaling=4.0),
        CohereConfig(**SIZES, intermediate_size=64, logit_scale=0.1),
        MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_of_a_few_rows_at_a_time(config, tmp_path, sequences, monkeypatch):
    """Losses, entropies and gradients are those from whole logits, with no more rows of logits than allowed."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr(logits, "MIN_ROWS", 7)
    monkeypatch.setattr(logits, "CACHED_LOGITS_BYTES", 0)
    loaded = engine(tmp_path)
    requests = [Request(ids, len(ids) // 3, (*BOTH, "entropy")) for ids in sequences]
    rows: list[int] = []
    head = loaded.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0][..., 0].numel()))
    scores = loaded.score(requests)
    assert max(rows) == 7
    assert sum(rows) == sum(len(ids) - max(1, len(ids) // 3) for ids in sequences)
    loaded.logits_of = None
    for one, other in zip(scores, loaded.score(requests), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert max(rows) > 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_that_round_differently_for_fewer_rows(dtype, tmp_path):
    """The product of the shape of SmolLM2-135M depends on the number of rows, by about 1e-7 of the logits."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, intermediate_size=64, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert engine(tmp_path, dtype=dtype).logits_of is not None


def test_logits_that_depend_on_more_than_hidden_states():
    expected = torch.randn(31, 258, generator=torch.Generator().manual_seed(0)) + 100
    assert logits.same_logits(expected + 1e-5, expected)
    assert not logits.same_logits(expected * 1.01, expected)
    assert not logits.same_logits(expected + torch.linspace(0, 0.01, 258), expected)
    assert not logits.same_logits(expected * torch.nan, expected)
    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        masked = expected.index_fill(1, torch.arange(9), lowest)
        assert logits.same_logits(masked + 1e-5, masked)
        assert not logits.same_logits(torch.where(masked > 0, masked * 1.01, masked), masked)


def test_models_whose_layers_cannot_be_replaced(tmp_path, sequences, loop_losses):
    """OPT calls its decoder, not its layers as a whole."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(OPTConfig(**sizes, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    loaded = engine(tmp_path)
    assert loaded.logits_of is None
    [[losses]] = loaded.score([Request(sequences[0])])
    np.testing.assert_allclose(losses, loop_losses(loaded.model, sequences[0]), rtol=0, atol=TOLERANCE)


def test_batches_hold_at_most_batch_tokens_with_padding():
    lengths = [5, 1, 9, 30, 2, 5, 4]
    groups = list(batches(lengths, 12))
    assert groups == [[3], [2], [0, 5], [6, 4, 1]]


def test_long_batches_have_little_padding():
    lengths = [1000, 40, 960, 880, 300, 10, 950, 200]
    assert list(batches(lengths, 8192)) == [[0, 2, 6], [3], [4], [7, 1], [5]]
    assert list(batches([600, 570, 540], 8192)) == [[0, 1, 2]], "60 + 30 of 1,800 tokens are 5 %"
    assert list(batches([600, 570, 539], 8192)) == [[0, 1], [2]]


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


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SIZES, intermediate_size=64, is_decoder=True, pad_token_id=1, initializer_range=0.5),
        CTRLConfig(vocab_size=258, n_embd=32, dff=64, n_layer=1, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_need_ids_have_gradients(config, tmp_path):
    """RoBERTa gives the padding token another position; CTRL changes its embeddings in place."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded, ids = engine(tmp_path), np.array([5, 1, 7, 1, 9, 200, 3], np.int32)
    [[losses, gradients]] = loaded.score([Request(ids, quantities=BOTH)])
    np.testing.assert_allclose(losses, loaded.score([Request(ids)])[0][0], rtol=0, atol=TOLERANCE)
    assert (gradients[1:-1] > 0).all()


def test_only_sequences_with_gradients_take_a_backward_pass(reference_model, sequences):
    """Whatever fits into a batch with them."""
    loaded = engine(reference_model)
    kept: list[tuple[int, bool]] = []

    def keep(module: torch.nn.Module, args: object, kwargs: object, output: object) -> None:
        kept.append((len(output[0]), output[0].requires_grad))

    loaded.model.base_model.register_forward_hook(keep, with_kwargs=True)
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


def test_gradients_beyond_float16_are_clipped(make_model):
    path = make_model(seed=4, num_hidden_layers=0)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.embed_tokens.weight.data *= 1e-6
    model.model.norm.weight.data *= 100
    model.save_pretrained(path)
    (scores,) = engine(path).score([Request(np.array([7, 3, 250], np.int32), 0, ("gradient",))])
    assert scores[0, 1:].tolist() == [FLOAT16_MAX, 0]
