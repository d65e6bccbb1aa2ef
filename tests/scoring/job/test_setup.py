"""Settings of a run, resolved without Ray."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.manifest import Contrast, ShortContext
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.conditions.models import ScoringModel
from weighted_mtp.scoring.conditions.plan import ScoringPlan, plan_columns
from weighted_mtp.scoring.conditions.prompts import Prompt
from weighted_mtp.scoring.engines.base import EngineConfig
from weighted_mtp.scoring.job.setup import (
    ModelFinder,
    ScoringInputs,
    check_inputs,
    describe_conditions,
    describe_request,
    extra_quantities,
    plan_method,
    set_up,
)

MODEL = ScoringModel("m", Path("/models/m"), "fingerprint", 64, revision="commit")
RECURRENT = ScoringModel("r", Path("/models/r"), "other", 64, recurrent=True)
ENGINE = EngineConfig(
    "vllm", "pooler", "bfloat16", 64, 64, 1, on_gpu=True, engine_args={"quantization": "fp8", "max_num_seqs": 8}
)


@pytest.fixture
def tokens(make_shard_set: Callable[..., ShardSet]) -> ShardSet:
    return make_shard_set([[1, 2, 3], [4, 5]], {"loss_old": [[1, 2, 3], [4, 5]]}, sequence_columns={"reward": [1, 2]})


@pytest.fixture
def config(tokens: ShardSet, tmp_path: Path) -> Callable[..., ScoreConfig]:
    def make(**settings: object) -> ScoreConfig:
        defaults = {"input": tokens.path, "output": tmp_path / "scored", "engine": "transformers", "reference": "m"}
        return ScoreConfig.model_validate(defaults | settings)

    return make


def refuse(message: str) -> None:
    raise AssertionError(f"there should be no warning: {message}")


def test_extra_quantities() -> None:
    assert extra_quantities(False, False) == []
    assert extra_quantities(entropy=True, gradient=True) == ["entropy", "gradient"]


@pytest.mark.parametrize(
    ("wanted", "model", "expected", "warnings"),
    [
        ("auto", MODEL, "pooler", 0),
        ("prompt_logprobs", MODEL, "prompt_logprobs", 0),
        ("auto", RECURRENT, "prompt_logprobs", 1),
        ("pooler", RECURRENT, "pooler", 0),
    ],
)
def test_recurrent_models_use_the_public_interface_unless_told_otherwise(
    wanted: Any, model: ScoringModel, expected: str, warnings: int
) -> None:
    heard: list[str] = []
    assert plan_method(wanted, {}, plan_columns(model, None, None), heard.append) == expected
    assert len(heard) == warnings
    assert all(message.startswith("r has a recurrent state") for message in heard)


def test_quantities_that_vllm_does_not_compute() -> None:
    with pytest.raises(UserError, match="--gradient: vLLM computes no gradients"):
        plan_method("auto", {}, plan_columns(MODEL, None, None, ["gradient"]), refuse)
    with pytest.raises(UserError, match="--entropy: prompt_logprobs returns no entropies"):
        plan_method("prompt_logprobs", {}, plan_columns(MODEL, None, None, ["entropy"]), refuse)
    assert plan_method("pooler", {}, plan_columns(MODEL, None, None, ["entropy"]), refuse) == "pooler"


def test_models_are_checked_once_and_their_length_for_every_prompt(
    tokens: ShardSet, make_model: Callable[..., Path]
) -> None:
    path = str(make_model(max_position_embeddings=10))
    find = ModelFinder(tokens, trust_remote_code=False)
    model = find(path, "--reference")
    assert model.max_length == 10
    assert find(path, "--conditions.a", Prompt("", (1,) * 7)) is model
    with pytest.raises(
        UserError, match=r"--conditions\.b: .* reads at most 10 tokens, but the corpus has a sequence of 3"
    ):
        find(path, "--conditions.b", Prompt("", (1,) * 8))


def test_inputs_that_cannot_be(config: Callable[..., ScoreConfig], tokens: ShardSet) -> None:
    with pytest.raises(UserError, match=r"--output .*: is also the --input; choose another"):
        check_inputs(config(output=tokens.path), refuse)
    contrasts = {"reference": None, "contrasts": {"new": "loss_old - loss_old"}}
    for setting in ({"engine_method": "pooler"}, {"engine_args": {"a": 1}}, {"tensor_parallel_size": 2}):
        with pytest.raises(UserError, match="are settings of vLLM; leave them out with --engine transformers"):
            check_inputs(config(**contrasts, **setting), refuse)


def test_contrasts_of_stored_columns_need_no_model(config: Callable[..., ScoreConfig], tokens: ShardSet) -> None:
    found = check_inputs(config(reference=None, contrasts={"new": " loss_old-loss_old"}), refuse)
    assert found.source.manifest == tokens.manifest
    assert found.plan == ScoringPlan({}, {"new": Contrast(minuend="loss_old", subtrahend="loss_old")})
    assert (found.engine, found.method) == ("transformers", None)


def test_an_engine_has_room_for_its_probe(
    config: Callable[..., ScoreConfig], make_shard_set: Callable[..., ShardSet]
) -> None:
    """Also if no document has more than one token."""
    single = make_shard_set([[1], [2]], name="single")
    plan = plan_columns(MODEL, None, None)
    setup = set_up(config(input=single.path), ScoringInputs(single, plan, "transformers", None))
    assert setup.engine.max_length == 2


def test_ids_beyond_the_embeddings_are_refused(
    make_shard_set: Callable[..., ShardSet], make_model: Callable[..., Path]
) -> None:
    """The ids of the corpus and of prompts count, not those of the tokenizer, which has 258."""
    path = str(make_model(vocab_size=200))
    find = ModelFinder(make_shard_set([[1, 199]], name="fits"), trust_remote_code=False)
    find(path, "--reference", Prompt("", (199,)))
    with pytest.raises(UserError, match=r"--conditions\.a: .* has 200 token ids, but the corpus has the id 201; use"):
        find(path, "--conditions.a", Prompt("", (3, 201)))
    with pytest.raises(UserError, match=r"--base: .* has 200 token ids, but the corpus has the id 200"):
        ModelFinder(make_shard_set([[1, 200]], name="beyond"), trust_remote_code=False)(path, "--base")


def test_settings_become_an_engine_a_pool_and_a_request(config: Callable[..., ScoreConfig], tokens: ShardSet) -> None:
    plan = plan_columns(MODEL, None, ShortContext(size=8, stride=6))
    settings = config(batch_tokens=128, workers=2, cpus_per_worker=3, dtype="float32", suffix="_2")
    setup = set_up(settings, ScoringInputs(tokens, plan, "transformers", None))
    assert (setup.engine.batch_tokens, setup.engine.max_length, setup.engine.threads) == (128, 3, 3)
    assert (setup.engine.dtype, setup.pool.max_workers, setup.pool.cpus) == ("float32", 2, 3)
    assert setup.plan.columns == ("loss_reference_2", "loss_short_2", "long_short_2")
    assert list(setup.origins) == list(setup.plan.columns)
    assert setup.origins["long_short_2"] == Contrast(minuend="loss_short_2", subtrahend="loss_reference_2")
    assert json.loads(setup.request)["input"] == tokens.manifest.digest
    assert setup.task.bos_token_id == 256
    assert setup.task.source.directory.is_absolute()


def test_a_new_column_may_not_be_called_as_one_of_the_corpus(
    config: Callable[..., ScoreConfig], tokens: ShardSet
) -> None:
    plan = ScoringPlan({}, {"reward": Contrast(minuend="loss_old", subtrahend="loss_old")})
    with pytest.raises(UserError, match="already has a corpus column 'reward'; give the new columns other names"):
        set_up(config(), ScoringInputs(tokens, plan, "transformers", None))


def test_settings_of_speed_are_no_part_of_a_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighted_mtp.scoring.job.setup.engine_version", lambda name: "1.0")
    conditions = describe_conditions(plan_columns(MODEL, None, ShortContext(size=8, stride=6)), ENGINE)
    short = conditions["loss_short"]
    assert (short.model, short.revision, short.fingerprint) == ("m", "commit", "fingerprint")
    assert (short.device, short.dtype, short.engine_method) == ("cuda", "bfloat16", "pooler")
    assert short.window == ShortContext(size=8, stride=6)
    assert short.engine_args == {"quantization": "fp8"}
    assert conditions["loss_reference"].window is None


def test_a_moved_model_is_the_same_request(tokens: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighted_mtp.scoring.job.setup.engine_version", lambda name: "1.0")
    moved = ScoringModel("elsewhere", Path("/elsewhere"), "fingerprint", 64)
    requests = [
        describe_request(tokens, describe_conditions(plan_columns(model, None, None), ENGINE))
        for model in (MODEL, moved, RECURRENT)
    ]
    assert requests[0] == requests[1] != requests[2]


def test_every_model_may_be_a_training_run(
    config: Callable[..., ScoreConfig], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(make_model(), run / "model")
    for name in ("run.json", "summary.json"):
        (run / name).write_text("{}")
    settings = config(reference=str(run), base=str(run), conditions={"mine": {"model": str(run), "prompt": "x"}})
    measurements = check_inputs(settings, refuse).plan.measurements
    assert list(measurements) == ["loss_reference", "loss_base", "loss_mine"]
    assert {measurement.model.source for measurement in measurements.values()} == {run / "model"}
    assert {measurement.model.name for measurement in measurements.values()} == {str(run / "model")}
