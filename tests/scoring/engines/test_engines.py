"""Both engines against a plain loop over the model's own logits."""

import itertools
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, JambaConfig, MambaConfig

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.engines import base
from weighted_mtp.scoring.engines.base import (
    Engine,
    EngineConfig,
    Request,
    check_engine_args,
    choose_engine,
    choose_method,
    engine_version,
    is_recurrent,
    load_engine,
    runs_on_gpu,
)
from weighted_mtp.scoring.engines.transformers_engine import TransformersEngine, batches

TOLERANCE = 1e-4
ENGINES = ["transformers", "vllm-pooler", "vllm-prompt_logprobs"]


def engine_config(name: str, batch_tokens: int) -> EngineConfig:
    name, _, method = name.partition("-")
    return EngineConfig(name, method or None, "float32", batch_tokens=batch_tokens, max_length=256, threads=2)


def loop_losses(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """-log p of every token, from the definition: one forward pass for each prefix."""
    losses = [float("nan")]
    for position in range(1, len(ids)):
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids[:position].astype(np.int64))[None]).logits[0, -1]
        losses.append(float(-logits.double().log_softmax(-1)[ids[position]]))
    return np.asarray(losses)


def losses_of(engine: Engine, sequences: list[np.ndarray], first_scored: list[int] | None = None) -> list[np.ndarray]:
    firsts = first_scored or [0] * len(sequences)
    return [scores[0] for scores in engine.score([Request(*pair) for pair in zip(sequences, firsts, strict=True)])]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 258, length).astype(np.int32) for length in (40, 1, 256, 2, 100, 33, 1, 256)]


@pytest.fixture(scope="module")
def expected(sequences: list[np.ndarray], reference_model: Path) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(reference_model).eval()
    return [loop_losses(model, ids) for ids in sequences]


@pytest.fixture(
    scope="module",
    params=itertools.product(ENGINES, ["small", "large"]),
)
def engine(request: pytest.FixtureRequest, reference_model: Path) -> Engine:
    name, size = request.param
    if name != "transformers":
        request.getfixturevalue("vllm_installed")
    # 48 tokens are less than most sequences: vLLM must cut them into chunks, transformers must let them stand alone.
    return load_engine(reference_model, engine_config(name, 48 if size == "small" else 8192))


def test_losses_equal_the_definition(engine, sequences, expected):
    losses = losses_of(engine, sequences)
    for result, wanted in zip(losses, expected, strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, wanted, rtol=0, atol=TOLERANCE)


def test_results_start_at_the_first_scored_position(engine, sequences, expected):
    first_scored = [7, 0, 200, 1, 0, 32, 0, 255]
    losses = losses_of(engine, sequences, first_scored)
    for result, wanted, first in zip(losses, expected, first_scored, strict=True):
        np.testing.assert_allclose(result, wanted[first:], rtol=0, atol=TOLERANCE)


def test_no_work_and_no_context(engine):
    assert engine.score([]) == []
    (alone,) = losses_of(engine, [np.array([5], np.int32)])
    assert np.isnan(alone).tolist() == [True]


def test_equal_requests_give_equal_bits(engine, sequences):
    first, second = (losses_of(engine, sequences) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()


def test_logits_are_the_models_own(tmp_path, sequences):
    """Gemma 2 caps its logits after the output layer; a loss from hidden states and weights alone would miss that."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0, initializer_range=0.5)
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path, engine_config("transformers", 8192))
    (losses,) = losses_of(engine, [sequences[0]])
    np.testing.assert_allclose(losses, loop_losses(model, sequences[0]), rtol=0, atol=TOLERANCE)


def test_batches_hold_at_most_batch_tokens_with_padding():
    lengths = [5, 1, 9, 30, 2, 5, 4]
    groups = list(batches(lengths, 12))
    assert groups == [[3], [2], [0, 5], [6, 4, 1]]


def test_auto_is_vllm_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    assert choose_engine("auto") == choose_engine("vllm") == "vllm"
    assert choose_engine("transformers") == "transformers"


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    with pytest.raises(UserError, match=r"weighted-mtp\[cuda\] or weighted-mtp\[cpu\]"):
        choose_engine("vllm")


def test_models_with_a_state_of_their_own_are_scored_by_the_public_api():
    assert choose_method("auto", []) == choose_method("pooler", ["mamba"]) == "pooler"
    assert choose_method("auto", ["mamba"]) == choose_method("prompt_logprobs", []) == "prompt_logprobs"
    assert is_recurrent(MambaConfig())
    assert is_recurrent(JambaConfig())
    assert not is_recurrent(Gemma2Config())


@pytest.mark.usefixtures("vllm_installed")
def test_engine_arguments_are_vllms_own_and_not_ours():
    check_engine_args({"max_num_batched_tokens": 4096, "quantization": "fp8"})
    with pytest.raises(
        UserError, match=r"--engine_args\.max_num_batchd_tokens: .* did you mean max_num_batched_tokens"
    ):
        check_engine_args({"max_num_batchd_tokens": 4096})
    with pytest.raises(UserError, match=r"--engine_args\.dtype: is set by wmtp; use --dtype"):
        check_engine_args({"dtype": "float16"})
    with pytest.raises(UserError, match=r"--engine_args\.modle: vLLM .* has no such argument; see"):
        check_engine_args({"modle": "llama"})
    with pytest.raises(UserError, match=r"--engine_args\.load_format dummy: would score with random weights"):
        check_engine_args({"load_format": "dummy"})


def test_the_cpu_build_of_vllm_has_its_own_name(monkeypatch):
    def version(name: str) -> str:
        if name == "vllm":
            raise PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(base, "version", version)
    assert engine_version("vllm") == "1.2.3"
    assert not runs_on_gpu("vllm")
    assert runs_on_gpu("transformers")
