"""Whole training runs, with several sets and mixtures."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import LENGTHS, metrics, trained
from format_3 import write_format_3
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from weighted_mtp.schemas.configs import EvaluateConfig, TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.progress import hidden_bar
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.upgrade import upgrade
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.evaluate import evaluate
from weighted_mtp.training.run.train import train

pytestmark = pytest.mark.integration


def test_training_learns_and_reports(config: Callable[..., TrainConfig]) -> None:
    run = config(
        "run", max_steps=30, weights={"preset": "uniform"}, eval_every=15, checkpoint_every=14, keep_checkpoints=True
    )
    summary = train(run)
    logged = metrics(run)
    assert logged[-2]["loss"] < logged[0]["loss"] - 0.5  # random bytes can only be memorised
    assert [line["step"] for line in logged if "eval_loss_1" in line] == [15, 30]
    assert 0.8 * 30 * 4 * 64 < summary["tokens"] < 30 * 4 * 64  # without padding
    assert sorted(path.name for path in (run.output / "checkpoints").iterdir()) == ["step-00000028", "step-00000030"]
    assert train(run)["already_complete"]


def test_training_shows_nothing_unless_asked_to(
    config: Callable[..., TrainConfig],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Columns are read in a pass over the corpus, a set is evaluated, and a stopped run continues."""
    monkeypatch.setattr(logging.getLogger("weighted_mtp"), "handlers", [])  # those of commands in this process
    bars: list[dict[str, Any]] = []

    def make_bar(**settings: Any) -> tqdm:
        bars.append(settings)
        return hidden_bar(**settings)

    formula = "normalise(relu(excess_loss + 0.5 * long_short), by=corpus)"
    run = config("run", weights={"formula": formula}, keep_checkpoints=True)
    capfd.readouterr()
    train(run)
    with caplog.at_level("INFO", "weighted_mtp"):
        train(run.model_copy(update={"continue_steps": 2}), make_bar)
    assert capfd.readouterr() == ("", "")
    assert [bar["desc"] for bar in bars] == ["reading excess_loss, long_short", "train", "evaluate"]
    assert [record.getMessage() for record in caplog.records] == [f"{run.output}: continuing from step-00000006"]


def test_weight_share_is_reported(config: Callable[..., TrainConfig]) -> None:
    run = config("run", weights={"preset": "rho1-static", "fraction": 0.25}, max_steps=20)
    assert train(run)["selected_share"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("max_steps", [1, 6])
def test_diverged_model_is_not_saved(max_steps: int, config: Callable[..., TrainConfig]) -> None:
    """With one step the loss is still finite, and only the update is not. A corrected run may use the directory."""
    run = config("run", optimizer={"learning_rate": 1e38, "warmup_ratio": 0.0}, max_steps=max_steps)
    with pytest.raises(UserError, match="not finite"):
        train(run)
    assert not list((run.output / "checkpoints").glob("step-*"))
    assert not (run.output / "model").exists()
    assert train(config("run", max_steps=max_steps))["steps"] == max_steps


def test_an_epoch_sees_the_whole_corpus(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    """Two sequences of 40 do not fit a row of 64: steps must follow the rows, not the tokens."""
    shards = scored_set([40] * 24, name="forties")
    summary = train(config("run", input=shards.path, max_steps=None, epochs=1.0))
    assert summary["steps"] == 6
    assert summary["tokens"] == shards.manifest.tokens


def test_rows_are_as_long_as_the_longest_sequences_by_default(config: Callable[..., TrainConfig]) -> None:
    run = config("run", sequence_length=None, max_steps=1)
    train(run)
    assert json.loads((run.output / "run.json").read_text())["config"]["sequence_length"] == max(LENGTHS)


def test_a_second_set_changes_nothing_but_what_its_column_weighs(
    config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]
) -> None:
    """Uniform weights give the same losses with it; its column gives those of a set that holds the column itself."""
    one = config("one", max_steps=4, weights={"preset": "uniform"})
    first = ShardSet.open(one.input[0])
    second, both = add_column(first, "second"), add_column(first, "both", keep=True)
    two = config("two", max_steps=4, weights={"preset": "uniform"}, input=f"{first.path},{second.path}")
    weights = {"preset": "rho1-static", "column": "loss_b", "fraction": 0.3}
    zipped = config("zipped", max_steps=4, weights=weights, input=(first.path, second.path))
    whole = config("whole", max_steps=4, weights=weights, input=both.path)
    for run in (one, two, zipped, whole):
        train(run)
    assert metrics(one) == metrics(two)
    assert metrics(zipped) == metrics(whole)
    assert metrics(zipped) != metrics(one)


def test_a_mixture_continues_bit_for_bit_and_only_as_it_was(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of threads may change on the way; sets and shares may not."""
    second, third = (scored_set(LENGTHS, name=name, seed=seed) for seed, name in enumerate(("second", "third"), 2))
    mix = {str(second.path): 0.3, str(third.path): 0.2}
    config = partial(config, checkpoint_every=2)
    whole, broken = config("whole", mix=mix), config("broken", mix=mix)
    train(whole)
    save = run_module.RunDirectory.save_checkpoint

    def stop_after_saving(self: Any, accelerator: Any, state: Any, step: int) -> None:
        save(self, accelerator, state, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    reordered = dict(reversed(mix.items()))
    for other in ({}, {str(second.path): 0.3}, {**mix, str(third.path): 0.1}, reordered):
        with pytest.raises(UserError, match=r"other settings \(inputs.mix\)"):
            train(config("broken", mix=other))
    train(config("broken", mix=mix, loader_workers=3))
    assert metrics(whole) == metrics(broken)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(broken)[name]), name


def test_an_epoch_of_a_mixture_is_one_of_the_input(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    shards, other = scored_set([64] * 24, name="rows"), scored_set([64] * 3, name="few", seed=1)
    run = config("run", input=shards.path, mix={str(other.path): 0.25}, max_steps=None, epochs=1.0)
    assert train(run)["steps"] == 8


def test_a_mixed_set_may_be_zipped(config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]) -> None:
    """Its column may lie in another set than its tokens."""
    first = ShardSet.open(config("run").input[0])
    second, both = add_column(first, "second"), add_column(first, "both", keep=True)
    weights = {"preset": "rho1-static", "column": "loss_b", "fraction": 0.3}
    runs = [
        config(name, input=both.path, mix={mixed: 0.5}, weights=weights, max_steps=4)
        for name, mixed in (("zipped", f"{first.path},{second.path}"), ("whole", str(both.path)))
    ]
    for run in runs:
        train(run)
    assert metrics(runs[0]) == metrics(runs[1])


def test_announced_native_heads_are_not_lost_without_a_word(config: Callable[..., TrainConfig]) -> None:
    """No model with such layers is needed: the config announces them."""
    run = config("run")
    file = Path(run.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    with pytest.raises(UserError, match=r"announces 1 multi-token-prediction .*; set num_nextn_predict_layers to 0 in"):
        train(run)


@pytest.mark.parametrize("sharded", [False, True])
def test_native_heads_in_the_weights_are_not_lost_without_a_word(
    config: Callable[..., TrainConfig], sharded: bool
) -> None:
    """Configs such as those of Qwen3-Next do not announce them."""
    run = config("run")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    weights = {**model.state_dict(), "mtp.layers.0.mlp.up_proj.weight": torch.ones(2)}
    file = Path(run.model) / "model.safetensors"
    file.unlink()
    model.save_pretrained(run.model, state_dict=weights, max_shard_size="50KB" if sharded else "50GB")
    assert file.exists() != sharded
    with pytest.raises(UserError, match=r"has multi-token-prediction .* \(mtp\.layers\.0\.mlp\.up_proj\.weight\)"):
        train(run)
    AutoModelForCausalLM.from_pretrained(run.model).save_pretrained(run.model)
    train(run)


def test_a_run_that_learnt_nothing_is_no_success(
    config: Callable[..., TrainConfig], scored_set: Callable[..., ShardSet]
) -> None:
    shards = scored_set(LENGTHS, name="silent", silent_after=1)
    run = config(
        "run", input=shards.path, weights={"preset": "soft-threshold"}, batch_size=1, micro_batch_size=1, max_steps=1
    )
    with pytest.raises(UserError, match="none of the 1 steps had a target with weight"):
        train(run)
    assert not (run.output / "model").exists()


CONSTANT = {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}


def test_a_run_on_an_upgraded_set_is_the_run_on_the_set(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    run = config("run", weights={"formula": "normalise(top(excess_loss, 0.6))"})
    old = write_format_3(ShardSet.open(run.input[0]), tmp_path / "old")
    upgrade(old, tmp_path / "new", lambda shard: None)
    other = config("other", weights=run.weights, input=tmp_path / "new")
    for each in (run, other):
        train(each)
    assert metrics(run) == metrics(other)
    expected = trained(run)
    for name, value in trained(other).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", [CONSTANT, {"learning_rate": 1e-2, "warmup_ratio": 0.2}])
def test_a_continued_run_equals_one_that_was_long_from_the_start(
    optimizer: dict[str, Any], config: Callable[..., TrainConfig]
) -> None:
    """With a constant schedule it also equals a run with more steps, as the same data follows."""
    settings = {"max_steps": 10, "optimizer": optimizer, "weights": {"preset": "dense", "warmup_ratio": 0.5}}
    short = config("run", keep_checkpoints=True, **settings)
    longer, whole = (config(name, continue_steps=5, log_every=1, **settings) for name in ("run", "whole"))
    train(short)
    finished = trained(short)
    assert train(longer)["steps"] == train(whole)["steps"] == 15
    assert not torch.equal(finished["lm_head.weight"], trained(longer)["lm_head.weight"])
    plain = [whole]
    if optimizer == CONSTANT:
        weights = {"preset": "dense", "warmup_ratio": 1 / 3}
        plain.append(config("plain", **settings | {"max_steps": 15, "weights": weights}))
        train(plain[1])
    for other in plain:
        for name, value in trained(longer).items():
            assert torch.equal(value, trained(other)[name]), name
    assert metrics(longer)[-6:] == metrics(whole)[-6:]
    rates = [line["learning_rate"] for line in metrics(longer)[-6:-1]]
    assert rates == pytest.approx([1e-2 if optimizer == CONSTANT else 1e-3] * 5)
    for again in (longer, short):
        assert train(again)["already_complete"]
    assert json.loads((longer.output / "summary.json").read_text())["continued_steps"] == 5


def test_a_killed_continuation_leaves_the_finished_run_or_one_that_resumes(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after its first checkpoint, before its model replaces the old one, and in between."""
    settings = {"max_steps": 4, "keep_checkpoints": True, "checkpoint_every": 2}
    short, longer, whole = (config(*given, **settings) for given in (("run",), ("run",), ("whole",)))
    longer, whole = (run.model_copy(update={"continue_steps": 4}) for run in (longer, whole))
    train(whole)
    train(short)
    finished = trained(short)
    directory = run_module.RunDirectory

    def kill_after(name: str) -> None:
        method = getattr(directory, name)

        def die(self: Any, *args: Any) -> None:
            method(self, *args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(directory, name, die)
            with pytest.raises(KeyboardInterrupt):
                train(longer)

    kill_after("save_checkpoint")
    steps = sorted(path.name for path in (short.output / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000006"]
    assert train(short)["already_complete"]
    assert all(torch.equal(value, finished[name]) for name, value in trained(short).items())
    kill_after("reopen")
    with pytest.raises(UserError, match="this training run is not finished"):
        train(config("next", model=str(longer.output)))
    assert train(longer)["steps"] == 8
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(longer).items())


def test_a_finished_run_without_checkpoints_cannot_continue(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    train(run)
    finished = trained(run)
    with pytest.raises(UserError, match=r"--continue_steps 2: .*/run is finished and has no checkpoints.*--model .*/"):
        train(config("run", continue_steps=2))
    assert train(run)["already_complete"]
    assert all(torch.equal(value, finished[name]) for name, value in trained(run).items())


def test_a_model_with_code_of_its_own(config: Callable[..., TrainConfig], make_own_code: Callable[..., Path]) -> None:
    own = make_own_code()
    run = config("run", model=str(own), weights={"preset": "uniform"}, max_steps=2)
    with pytest.raises(UserError, match=r"--model .*it needs Python code of its own.*; if you trust it, add --trust"):
        train(run)
    assert not run.output.exists()
    trusted = run.model_copy(update={"trust_remote_code": True})
    train(trusted)
    assert train(trusted)["already_complete"]
    held_out = EvaluateConfig(model=str(run.output), input=run.eval_input[0])
    with pytest.raises(UserError, match=r"/run/model: config.json cannot be read \(it needs Python code of its own\)"):
        evaluate(held_out)
    assert len(evaluate(held_out.model_copy(update={"trust_remote_code": True})).losses) == 2
    (own / "modeling_own.py").write_text((own / "modeling_own.py").read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"holds a run with other settings \(inputs.model\)"):
        train(trusted)


def test_a_model_that_cannot_be_saved_is_not_trained(
    config: Callable[..., TrainConfig], make_own_code: Callable[..., Path]
) -> None:
    own = make_own_code()
    refusal = "    def save_pretrained(self, *args, **settings):\n        raise RuntimeError('not this one')\n"
    # transformers keeps the model class of a config class that it has seen in this process.
    for name, code in (("modeling_own.py", refusal), ("configuration_own.py", "    refuses = True\n")):
        (own / name).write_text((own / name).read_text() + code)
    run = config("run", model=str(own), weights={"preset": "uniform"}, trust_remote_code=True)
    with pytest.raises(UserError, match=r"could not be saved after training \(RuntimeError: not this one\)"):
        train(run)
    assert not (run.output / "metrics.jsonl").exists()


def test_a_padding_token_of_the_model_does_not_matter(config: Callable[..., TrainConfig]) -> None:
    """Its tokenizer has an id more than the corpus's, and its trunk has no embedding for it."""
    run = config("run", weights={"preset": "uniform"}, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(run.model)
    assert len(tokenizer) == 259
    assert train(run)["steps"] == 1
