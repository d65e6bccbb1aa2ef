"""The directory of a run: what it may hold, what may change when a run is resumed, and what is left at the end."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.train import train


def test_other_settings_are_refused_by_name(config: Callable[..., TrainConfig]) -> None:
    train(config("run"))
    with pytest.raises(UserError, match=r"other settings \(optimizer.learning_rate, weights.lam\)"):
        train(config("run", optimizer={"learning_rate": 1e-3}, weights={"preset": "dense", "lam": 0.5}))


def test_foreign_directory_is_left_alone(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("\\section{}")
    with pytest.raises(UserError, match="already holds something else"):
        train(run)
    assert [path.name for path in run.output.iterdir()] == ["thesis.tex"]


def test_a_run_continues_only_with_the_same_sets(
    config: Callable[..., TrainConfig], add_column: Callable[..., ShardSet]
) -> None:
    first = ShardSet.open(config("run").input[0])
    second, third = add_column(first, "second"), add_column(first, "third", column="loss_c")
    run = config("run", input=(first.path, second.path), max_steps=4)
    train(run)
    written = yaml.safe_load((run.output / "config.yaml").read_text())
    assert written["input"] == [str(first.path), str(second.path)]
    assert train(TrainConfig.model_validate(written))["already_complete"]
    for sets in [(first, third), (first, second, third), (first,), (second, first)]:
        with pytest.raises(UserError, match=r"other settings \(inputs.input\)"):
            train(config("run", input=tuple(shards.path for shards in sets), max_steps=4))


def test_live_weights_fix_the_passes_that_they_are_ranked_in(config: Callable[..., TrainConfig]) -> None:
    live = {"preset": "rho1", "column": "long_short"}
    train(config("run", weights=live))
    with pytest.raises(UserError, match=r"other settings \(passes.micro_batch_size\)"):
        train(config("run", weights=live, micro_batch_size=4))


def test_a_finished_run_has_no_checkpoints_unless_they_are_kept(config: Callable[..., TrainConfig]) -> None:
    removed, kept = config("removed"), config("kept", keep_checkpoints=True)
    for run in (removed, kept):
        train(run)
    assert not list(removed.output.glob("*checkpoints"))
    assert [path.name for path in (kept.output / "checkpoints").iterdir()] == ["step-00000006"]
    assert train(config("kept"))["already_complete"]
    assert not list(kept.output.glob("*checkpoints"))


def test_checkpoints_stay_until_the_run_is_finished_and_a_rerun_removes_leftovers(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed before its summary is written, then while its checkpoints are removed."""
    run = config("run")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def only_before_the_summary(path: Any, text: str) -> None:
        killed() if path.name == "summary.json" else write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_text", only_before_the_summary)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert (run.output / "checkpoints" / "step-00000006").exists()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "remove_tree", lambda path: killed() if path.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert (run.output / "summary.json").exists()
    assert [path.name for path in run.output.glob("*checkpoints")] == [".checkpoints"]
    assert train(run)["already_complete"]
    assert not list(run.output.glob("*checkpoints"))


def test_the_record_holds_the_number_of_steps_and_may_be_damaged(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    train(run)
    record = run.output / "run.json"
    assert json.loads(record.read_text())["steps"] == 6
    held = json.loads(record.read_text())
    lengths = ("64", 1, -5, 1 << 60, None, [])
    for content in ([], *(held | {"config": {"sequence_length": length}} for length in lengths)):
        record.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"run.json: is not the record of a training run; restore it"):
            train(config("next", model=str(run.output)))
    record.write_text("[]")
    with pytest.raises(UserError, match=r"other settings \(everything\)"):
        train(run)
    train(config("next"))
    summary = config("next").output / "summary.json"
    summary.write_text("[]")
    with pytest.raises(UserError, match=r"summary.json: is damaged; restore it, or remove it"):
        train(config("next"))
