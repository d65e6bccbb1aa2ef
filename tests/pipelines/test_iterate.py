"""Rounds of scoring and training, end to end on tiny models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weighted_mtp.pipelines.iterate import run
from weighted_mtp.pipelines.reports.catalogue import catalogue, read_entry
from weighted_mtp.schemas.configs import IterateConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.scoring.job.scorer import ScoringTask
from weighted_mtp.training.run.directory import RunDirectory

pytestmark = pytest.mark.integration

TRAINING = {
    "weights": {"preset": "rho1-static"},
    "heads": {"offsets": [1, 2]},
    "optimizer": {"learning_rate": 1e-2},
    "sequence_length": 64,
    "batch_size": 4,
    "max_steps": 4,
    "checkpoint_every": 2,
}


@pytest.fixture
def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in (60, 9, 100, 2, 33, 64)]


@pytest.fixture
def config(
    make_shard_set: Callable[..., ShardSet], make_model: Callable[..., Path], sequences: list[list[int]], tmp_path: Path
) -> Callable[..., IterateConfig]:
    tokens = make_shard_set(sequences, name="tokens", rows_per_shard=3)
    reference, base = make_model(seed=0), make_model(seed=1)

    def make(name: str = "rounds", train: dict[str, Any] | None = None, **settings: Any) -> IterateConfig:
        defaults = {"input": tokens.path, "output": tmp_path / name, "reference": str(reference), "base": str(base)}
        defaults |= {"score": {"engine": "transformers"}, "train": TRAINING | {"eval_input": tokens.path}}
        defaults["train"] |= train or {}
        return IterateConfig.model_validate(defaults | settings)

    return make


def losses(model: Path, sequences: list[list[int]]) -> np.ndarray:
    """-log p of all tokens but the first of each sequence."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    found = []
    for ids in sequences:
        with torch.inference_mode():
            log_p = loaded(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        found.append(-log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return np.concatenate(found)


def column(shards: ShardSet, name: str) -> np.ndarray:
    """All values of a column but the first of each sequence."""
    rows = [row for index in range(len(shards.manifest.shards)) for row in shards.read(index)[name].to_pylist()]
    return np.concatenate([row[1:] for row in rows])


def test_what_a_round_trains_is_the_reference_of_the_next(
    config: Callable[..., IterateConfig], score_here: list[ScoringTask], sequences: list[list[int]], capsys: Any
) -> None:
    settings = config()
    run(settings)
    first, second = (ShardSet.open(settings.output / f"round-{number}" / "scored") for number in (1, 2))
    runs = [settings.output / f"round-{number}" / "run" for number in (1, 2)]
    assert first.manifest.derived_from == ShardSet.open(settings.input).manifest.digest
    assert second.manifest.derived_from == first.manifest.digest
    old = ["loss_reference", "loss_base", "excess_loss"]
    assert list(first.manifest.columns) == old
    assert list(second.manifest.columns) == [*old, "loss_reference_2", "excess_loss_2"]
    assert list(score_here[1].plan.measurements) == ["loss_reference_2"]
    assert list(score_here[1].plan.stored) == ["loss_base"], "read, not computed again"

    base, trained = losses(Path(settings.base), sequences), losses(runs[0] / "model", sequences)
    np.testing.assert_allclose(column(second, "loss_reference_2"), trained, rtol=2.0**-11, atol=2.0**-10 + 1e-4)
    np.testing.assert_allclose(column(second, "excess_loss_2"), base - trained, rtol=2.0**-10, atol=2.0**-7)
    written = [yaml.safe_load((of / "config.yaml").read_text()) for of in runs]
    formulas = [f"normalise(top({name}, 0.6, by=corpus), by=corpus)" for name in ("excess_loss", "excess_loss_2")]
    assert [of["weights"]["formula"] for of in written] == formulas
    assert [of["model"] for of in written] == [settings.base, str(runs[0])], "the student goes on"

    rounds = json.loads((settings.output / "summary.json").read_text())["rounds"]
    assert [of["set_digest"] for of in rounds] == [first.manifest.digest, second.manifest.digest]
    references = [Path(settings.reference), runs[0] / "model"]
    assert [of["reference_fingerprint"] for of in rounds] == [model_fingerprint(path) for path in references]
    assert [of["weights"] for of in rounds] == formulas
    summaries = [json.loads((of / "summary.json").read_text()) for of in runs]
    for name in ("selected_share", "eval_loss_1", "eval_loss_2"):
        assert [of[name] for of in rounds] == [of[name] for of in summaries]
    lines = list(catalogue({shards.path: read_entry(shards.path) for shards in (first, second)}))
    assert sum(line.endswith(f"from {first.path}") for line in lines) == 1
    assert "excess_loss_2" in capsys.readouterr().out


@pytest.mark.slow
def test_stopped_and_repeated_is_unbroken(
    config: Callable[..., IterateConfig], score_here: list[ScoringTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first set is finished, and after a checkpoint of the second round."""
    whole = config("whole")
    run(whole)
    scored = len(score_here)
    stopped = config("stopped")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weighted_mtp.scoring.job.run.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    save = RunDirectory.save_checkpoint

    def save_and_stop(self: RunDirectory, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        if "round-2" in str(self.output) and step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    assert not (stopped.output / "summary.json").exists()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_checkpoint", lambda *args: (steps.append(args[-1]), save(*args))[1])
        run(stopped)
    assert steps == [4], "nothing that was done is done again"
    run(stopped)
    assert len(score_here) == scored + 3

    rounds, repeated = (json.loads((of.output / "summary.json").read_text())["rounds"] for of in (whole, stopped))
    for one, other in zip(rounds, repeated, strict=True):
        sets = [ShardSet.open(of["set"]).manifest for of in (one, other)]
        assert sets[0].shards == sets[1].shards
        places = dict.fromkeys(("set", "run", "set_digest"))  # the digest covers the names of the models
        assert one | places == other | places
    for part in ("round-1/run/model/model.safetensors", "round-2/run/model/model.safetensors"):
        one, other = load_file(whole.output / part), load_file(stopped.output / part)
        assert all(torch.equal(one[name], other[name]) for name in one)
    more = stopped.model_copy(update={"rounds": 3})
    run(more)
    assert (stopped.output / "round-3" / "run" / "summary.json").exists()


@pytest.mark.slow
def test_students_that_start_anew(
    config: Callable[..., IterateConfig], score_here: list[ScoringTask], make_model: Callable[..., Path]
) -> None:
    """Live weights also read the column of the round."""
    student = str(make_model(seed=2))
    settings = config(model=student, fresh=True, train={"weights": {"preset": "rho1"}, "max_steps": 2})
    run(settings)
    written = [
        yaml.safe_load((settings.output / f"round-{number}" / "run" / "config.yaml").read_text()) for number in (1, 2)
    ]
    assert [of["model"] for of in written] == [student, student]
    for of, name in zip(written, ("loss_reference", "loss_reference_2"), strict=True):
        assert of["weights"]["formula"] == f"normalise(top(live - {name}, 0.6, by=batch), by=batch)"


@pytest.mark.slow
def test_columns_of_the_user_that_end_like_those_of_a_round(
    config: Callable[..., IterateConfig], score_here: list[ScoringTask], make_model: Callable[..., Path]
) -> None:
    critics = {name: {"model": str(make_model(seed=seed))} for name, seed in (("critic", 2), ("critic_2", 3))}
    settings = config(
        score={"engine": "transformers", "conditions": critics},
        train={"weights": {"formula": "top(loss_critic - loss_reference, 0.6)"}, "max_steps": 2},
    )
    run(settings)
    written = [
        yaml.safe_load((settings.output / f"round-{number}" / "run" / "config.yaml").read_text()) for number in (1, 2)
    ]
    for of, name in zip(written, ("loss_reference", "loss_reference_2"), strict=True):
        assert of["weights"]["formula"] == f"top(loss_critic - {name}, 0.6)"


def test_what_cannot_be_iterated(config: Callable[..., IterateConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"run it without a launcher, and use --train\.ray_workers"):
        run(config())


def test_the_summary_of_a_training_run_is_not_replaced(config: Callable[..., IterateConfig]) -> None:
    settings = config()
    settings.output.mkdir()
    (settings.output / "summary.json").write_text('{"steps": 1}')
    with pytest.raises(UserError, match=r"already holds something else \(summary.json\); choose another --output"):
        run(settings)
