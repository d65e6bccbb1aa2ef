"""Named conditions: prompts and contrasts against plain forward passes over the concatenated token ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weighted_mtp.pipelines.reports.catalogue import catalogue, read_entry
from weighted_mtp.pipelines.reports.shard_set_report import build_report
from weighted_mtp.pipelines.score import run
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import Measurement
from weighted_mtp.scoring.conditions.prompts import Prompt, make_prompt
from weighted_mtp.scoring.engines.base import EngineConfig
from weighted_mtp.scoring.engines.loading import load_engine
from weighted_mtp.scoring.job.scorer import measure
from weighted_mtp.scoring.job.units import Attempt, commit

TOLERANCE = 1e-4
BOS = 256
BETTER, WORSE = "A helpful, correct answer:\n", "A wrong answer:\n"
LENGTHS = (40, 1, 100, 2, 1, 70)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """The first three start with BOS, one of them is nothing else."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 256, length).tolist() for length in LENGTHS]
    for ids in sequences[:3]:
        ids[0] = BOS
    return sequences


@pytest.fixture
def tokens(make_shard_set: Callable[..., ShardSet], sequences: list[list[int]]) -> ShardSet:
    return make_shard_set(sequences, rows_per_shard=4, name="tokens")


@pytest.fixture
def config(tokens: ShardSet, reference_model: Path, tmp_path: Path) -> Callable[..., ScoreConfig]:
    def make(**settings: object) -> ScoreConfig:
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "engine": "transformers"}
        return ScoreConfig.model_validate(defaults | settings)

    return make


@pytest.fixture(scope="module")
def prompt_ids(tokenizer_dir: Path) -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def load() -> Callable[[Path], torch.nn.Module]:
    return lambda path: AutoModelForCausalLM.from_pretrained(path).eval()


def plain_losses(model: torch.nn.Module, prompt: list[int], ids: list[int]) -> np.ndarray:
    """-log p of every token from one pass over everything that is before it; NaN where that is nothing."""
    bos = ids[:1] if ids[0] == BOS else []
    whole = [*bos, *prompt, *ids[len(bos) :]]
    with torch.inference_mode():
        log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    losses = [float("nan"), *(float(-log_p[at - 1, whole[at]]) for at in range(1, len(whole)))]
    kept = losses[len(prompt) + len(bos) :]
    return np.asarray([float("nan")] * len(bos) + kept)


def column(shards: ShardSet, name: str) -> np.ndarray:
    """A score column, the shards one after the other."""
    parts = [flat_values(shards.read(index)[name]) for index in range(len(shards.manifest.shards))]
    return np.concatenate(parts).astype(np.float64)


@pytest.mark.parametrize(
    "name",
    [
        "transformers",
        *(pytest.param(f"vllm-{way}", marks=pytest.mark.integration) for way in ("pooler", "prompt_logprobs")),
    ],
)
def test_losses_after_a_prompt_equal_those_of_the_concatenated_ids(
    name, request, reference_model, sequences, prompt_ids, load
):
    if name != "transformers":
        request.getfixturevalue("vllm_installed")
    engine_name, _, method = name.partition("-")
    engine = load_engine(
        reference_model,
        EngineConfig(engine_name, method or None, "float32", batch_tokens=48, max_length=160, threads=1),
    )
    model = ScoringModel("reference", reference_model, "1", 256)
    prompts = [None, *(Prompt(text, tuple(prompt_ids(text))) for text in (BETTER, WORSE))]
    measurements = [Measurement(model, prompt=prompt) for prompt in prompts]
    rows = [np.array(ids, np.int32) for ids in sequences]
    plain = load(reference_model)
    for scores, ids in zip(measure(engine, rows, measurements, BOS), sequences, strict=True):
        assert scores.dtype == np.float32
        for line, prompt in zip(scores, prompts, strict=True):
            expected = plain_losses(plain, list(prompt.input_ids) if prompt else [], ids)
            np.testing.assert_allclose(line, expected, rtol=0, atol=TOLERANCE)
    assert engine.computed_tokens == sum(
        len(ids) + (len(prompt.input_ids) if prompt else 0)
        for ids in sequences
        for prompt in prompts
        if len(ids) > 1 or (prompt and ids[0] != BOS) or (engine_name == "transformers" and prompt is None)
    )


def test_contrasts_of_prompts_and_of_models(
    config, score_here, sequences, reference_model, base_model, prompt_ids, load
):
    """T-REG's contrast, and one across two models, without a reference."""
    conditions = {
        "better": {"model": str(reference_model), "prompt": BETTER, "entropy": True},
        "worse": {"model": str(reference_model), "prompt": WORSE},
        "other": {"model": str(base_model), "prompt": WORSE},
        "plain": {"model": str(base_model)},
    }
    contrasts = {"t_reg": "loss_worse - loss_better", "tis": "loss_plain-loss_worse"}
    scored = run(config(conditions=conditions, contrasts=contrasts))
    names = ["loss_better", "entropy_better", "loss_worse", "loss_other", "loss_plain", "t_reg", "tis"]
    assert list(scored.manifest.columns) == names
    reference, base = load(reference_model), load(base_model)
    losses = {
        "better": [plain_losses(reference, prompt_ids(BETTER), ids) for ids in sequences],
        "worse": [plain_losses(reference, prompt_ids(WORSE), ids) for ids in sequences],
        "other": [plain_losses(base, prompt_ids(WORSE), ids) for ids in sequences],
        "plain": [plain_losses(base, [], ids) for ids in sequences],
    }
    expected = {name: np.concatenate(rows) for name, rows in losses.items()}
    for name, of in expected.items():
        np.testing.assert_allclose(column(scored, f"loss_{name}"), of, rtol=2.0**-11, atol=2.0**-10 + TOLERANCE)
    t_reg, tis = expected["worse"] - expected["better"], expected["plain"] - expected["worse"]
    np.testing.assert_allclose(column(scored, "t_reg"), t_reg, rtol=2.0**-11, atol=2.0**-10 + TOLERANCE)
    np.testing.assert_allclose(column(scored, "tis"), tis, rtol=2.0**-11, atol=2.0**-10 + TOLERANCE)
    missing = {name: of.statistics.missing for name, of in scored.manifest.columns.items()}
    assert missing == dict.fromkeys(names, 3) | {"loss_plain": 6, "tis": 6}, "only BOS has nothing before it"

    origins = {name: of.origin for name, of in scored.manifest.columns.items()}
    assert [origins[name].prompt for name in names[:5]] == [BETTER, BETTER, WORSE, WORSE, None]
    assert origins["loss_worse"].describe().startswith(f'{reference_model}, after "A wrong answer:\\n", full context')
    (lines,) = [list(catalogue({scored.path: read_entry(scored.path)}))]
    assert len(lines) == 1 + len(names)
    build_report(scored, "t_reg", 2)

    with pytest.raises(
        UserError, match=r"other inputs or settings \(columns\.entropy_better\.prompt, columns\.loss_better\.prompt\)"
    ):
        run(config(conditions=conditions | {"better": {**conditions["better"], "prompt": "x"}}, contrasts=contrasts))


def test_stored_columns_are_known_by_their_prompt(config, score_here, reference_model, tmp_path):
    """An empty prompt is the plain condition. Contrasts may be with what the input holds."""
    first = run(config(reference=str(reference_model)))
    conditions = {"plain": {"model": str(reference_model)}, "worse": {"model": str(reference_model), "prompt": WORSE}}
    contrasts = {"one": "loss_worse - loss_plain", "two": "loss_reference - loss_worse"}
    settings = {"input": first.path, "output": tmp_path / "more", "conditions": conditions, "suffix": "_2"}
    more = run(config(**settings, contrasts=contrasts))
    assert list(score_here[1].plan.measurements) == ["loss_worse_2"]
    assert list(score_here[1].plan.stored) == ["loss_reference"]
    assert list(more.manifest.columns) == ["loss_reference", "loss_worse_2", "one_2", "two_2"]
    assert more.manifest.columns["one_2"].origin.describe() == "loss_worse_2 - loss_reference"
    np.testing.assert_array_equal(column(more, "one_2"), -column(more, "two_2"))
    whole = run(config(output=tmp_path / "whole", conditions=conditions, contrasts={"one": contrasts["one"]}))
    np.testing.assert_array_equal(column(whole, "loss_worse"), column(more, "loss_worse_2"))
    assert np.nanmax(np.abs(column(whole, "one") - column(more, "one_2"))) <= 2.0**-7

    settings |= {"output": tmp_path / "none"}
    with pytest.raises(
        UserError, match=r"--contrasts\.one: no column 'loss_wrose' in --input or computed before it \(available"
    ):
        run(config(**settings, contrasts={"one": "loss_wrose - loss_plain"}))
    with pytest.raises(
        UserError, match=r"--contrasts\.one: loss_reference - loss_worse_2 would mix engines \(dtype differ\)"
    ):
        run(config(**settings, contrasts={"one": "loss_reference - loss_worse"}, dtype="bfloat16"))
    del conditions["worse"]
    with pytest.raises(UserError, match=r"--input already has all of these columns \(loss_reference\)"):
        run(config(**settings))
    only = run(config(**settings | {"input": more.path}, contrasts={"again": "one_2 - two_2"}))
    np.testing.assert_array_equal(column(only, "again_2"), 2 * column(more, "one_2"))


def test_a_new_reference_against_the_stored_one(config, score_here, reference_model, base_model, tmp_path):
    """In one run. A later run computes further differences of both without a model."""
    first = run(config(reference=str(reference_model)))
    settings = {"input": first.path, "reference": str(base_model), "suffix": "_new", "output": tmp_path / "more"}
    contrasts = {"gain": "loss_reference - loss_reference_new", "rest": "gain - loss_reference_new"}
    more = run(config(**settings, contrasts=contrasts))
    assert list(more.manifest.columns) == ["loss_reference", "loss_reference_new", "gain_new", "rest_new"]
    old, new = column(more, "loss_reference"), column(more, "loss_reference_new")
    assert np.nanmax(np.abs(old - new)) > 0.5
    np.testing.assert_allclose(column(more, "gain_new"), old - new, rtol=2.0**-10, atol=2.0**-6)
    np.testing.assert_allclose(column(more, "rest_new"), old - 2 * new, rtol=2.0**-10, atol=2.0**-6)
    settings |= {"input": more.path, "output": tmp_path / "again"}
    again = run(config(**settings, contrasts={"loss_of_it": "loss_reference_new - loss_reference"}))
    np.testing.assert_allclose(column(again, "loss_of_it_new"), -column(more, "gain_new"), rtol=0, atol=2.0**-6)


def test_contrasts_of_contrasts(config, score_here, reference_model, base_model, tmp_path):
    """In the order in which they are written, of one run or of two. Only the last difference is rounded."""
    settings = {
        "reference": str(reference_model),
        "base": str(base_model),
        "conditions": {"worse": {"model": str(base_model), "prompt": WORSE}},
        "contrasts": {"gap": "loss_worse - loss_base", "further": "excess_loss - gap", "half": "further - loss_base"},
    }
    scored = run(config(**settings))
    assert list(scored.manifest.columns)[3:] == ["excess_loss", "gap", "further", "half"]
    worse, base, reference = (column(scored, f"loss_{name}") for name in ("worse", "base", "reference"))
    for name, expected in {"further": 2 * base - reference - worse, "half": base - reference - worse}.items():
        np.testing.assert_allclose(column(scored, name), expected, rtol=2.0**-10, atol=2.0**-6)
    assert scored.manifest.columns["further"].origin.describe() == "excess_loss - gap"

    swapped = settings | {"reference": str(base_model), "base": str(reference_model), "suffix": "_2"}
    more = run(config(**swapped, input=scored.path, output=tmp_path / "more"))
    origins = {name: of.origin.describe() for name, of in more.manifest.columns.items()}
    assert origins["excess_loss_2"] == "loss_reference - loss_base"
    assert origins["gap_2"] == "loss_worse - loss_reference"
    assert origins["further_2"] == "excess_loss_2 - gap_2"
    np.testing.assert_allclose(column(more, "excess_loss_2"), -column(more, "excess_loss"), rtol=0, atol=2.0**-7)

    settings |= {"contrasts": dict(reversed(settings["contrasts"].items())), "output": tmp_path / "none"}
    with pytest.raises(UserError, match=r"--contrasts\.half: no column 'further' in --input or computed before it"):
        run(config(**settings))


def test_contrasts_alone_need_neither_models_nor_ray(make_shard_set, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    sequences = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    scores = {name: [[np.nan, *rng.random(len(ids) - 1)] for ids in sequences] for name in ("loss_a", "loss_b")}
    held = make_shard_set(sequences, scores, "held")
    settings = {"input": held.path, "output": tmp_path / "more"}
    config = ScoreConfig.model_validate(settings | {"contrasts": {"gap": "loss_a - loss_b", "twice": "gap - back"}})
    with pytest.raises(UserError, match=r"--contrasts\.twice: no column 'back' .* \(available: gap, loss_a, loss_b\)"):
        run(config)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray must not start")

    monkeypatch.setattr(ray, "init", refuse)
    contrasts = {"gap": "loss_a - loss_b", "back": "loss_b - loss_a", "twice": "gap - back"}
    config = ScoreConfig.model_validate(settings | {"contrasts": contrasts})
    assert run(config.model_copy(update={"dry_run": True})) is None
    assert "GPU hours" not in capsys.readouterr().out
    commits: list[str] = []

    def commit_one(output: Path, attempt: Attempt) -> None:
        if commits:
            raise KeyboardInterrupt
        commits.append(attempt.unit)
        commit(output, attempt)

    with monkeypatch.context() as patch:
        patch.setattr("weighted_mtp.scoring.job.run.commit", commit_one)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    more = run(config)
    printed = capsys.readouterr()
    assert "shards already done: 1" in printed.out
    assert list(more.manifest.columns) == ["loss_a", "loss_b", *contrasts]
    gap = column(held, "loss_a") - column(held, "loss_b")
    for name, expected in {"gap": gap, "back": -gap, "twice": 2 * gap}.items():
        np.testing.assert_allclose(column(more, name), expected, rtol=0, atol=2.0**-10)
    assert [check for check in verify(more.path, more.manifest) if check.fault] == []
    again = {"input": more.path, "output": tmp_path / "again", "contrasts": {"gap": contrasts["gap"]}, "suffix": "_2"}
    with pytest.raises(UserError, match=r"--input already has all of these columns \(gap\); request others"):
        run(ScoreConfig.model_validate(again))


def test_a_dry_run_counts_the_tokens_of_prompts(config, reference_model, base_model, prompt_ids, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    conditions = {
        "better": {"model": str(reference_model), "prompt": BETTER},
        "worse": {"model": str(reference_model), "prompt": WORSE},
        "other": {"model": str(base_model)},
    }
    assert run(config(reference=str(reference_model), conditions=conditions, dry_run=True)) is None
    printed = capsys.readouterr().out
    extra = len(LENGTHS) * (len(prompt_ids(BETTER)) + len(prompt_ids(WORSE)))
    assert f"at most {3 * sum(LENGTHS) + extra:,} by {reference_model}" in printed
    assert f"at most {sum(LENGTHS):,} by {base_model}" in printed


def test_impossible_settings_fail_before_any_work(config, tokens, make_model, tokenizer_dir):
    path = make_model(seed=3, max_position_embeddings=110)
    with pytest.raises(
        UserError,
        match=r"--conditions\.worse: .*llama-3 reads at most 110 tokens, but the corpus has a sequence of 100 "
        r"and the prompt has 16; shorten the prompt",
    ):
        run(
            config(
                conditions={
                    "fits": {"model": str(path), "prompt": "0123456789"},
                    "worse": {"model": str(path), "prompt": WORSE},
                }
            )
        )
    assert make_prompt("", "--conditions.plain.prompt", tokens) is None
