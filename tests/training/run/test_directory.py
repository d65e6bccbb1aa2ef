"""The directory of a run: what it may hold, what may change when a run is resumed, and what is left at the end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from weighted_mtp.schemas.configs import TrainConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import write_text
from weighted_mtp.training.run import directory as run_module
from weighted_mtp.training.run.preconditions import check_run, fixed_settings, read_summary
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
    for content in ([], {"name": "my experiment"}):
        record.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"run.json: is not the record of a training run; choose another --output"):
            train(run)


def test_a_model_is_not_replaced_by_one_of_other_settings(config: Callable[..., TrainConfig]) -> None:
    run = config("run")
    train(run)
    (run.output / "summary.json").unlink()
    for lost in ("model", "heads"):
        with pytest.raises(UserError, match=r"holds a run with other settings \(seed\)"):
            train(config("run", seed=1))
        shutil.rmtree(run.output / lost)
    assert train(config("run", seed=1))["steps"] == 6


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints", ".checkpoints", ".saving", "model", "heads", "wmtp", "summary.json"]
)
def test_links_of_a_run_are_refused_before_its_first_step(
    name: str, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = config("run")
    run.output.mkdir()
    record = {"config": fixed_settings(run), "inputs": {}}
    (run.output / "run.json").write_text(json.dumps(record))
    (run.output / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"run/{name}: should be a .* that the run can replace, and no link; move it"):
        check_run(run.output, run.output, {"config": record["config"]}, 0)
    (run.output / name).unlink()
    check_run(run.output, run.output, {"config": record["config"]}, 0)


def test_the_checkpoints_of_a_finished_run_may_lie_elsewhere(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = config("run", keep_checkpoints=True)
    train(run)
    (run.output / "checkpoints").rename(tmp_path / "elsewhere")
    (run.output / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert train(config("run"))["already_complete"]
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-00000006"]


def test_damaged_metrics_are_dropped(config: Callable[..., TrainConfig]) -> None:
    run = config("run", keep_checkpoints=True)
    train(run)
    (run.output / "summary.json").unlink()
    file = run.output / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b'{}\n[]\n{"step": "x"}\n' + whole + b"\0" * 40 + b'\n{"step": 3, "\xff": 1}\n{"step": 3')
    train(run)
    assert file.read_bytes().startswith(whole)
    assert all(json.loads(line)["step"] <= 6 for line in file.read_text().splitlines())


WHOLE: dict[str, Any] = {
    **dict.fromkeys(("steps", "tokens", "seconds", "tokens_per_second", "memory_gib", "bad_steps"), 1),
    **{"no_signal_steps": 0, "loss": 1.5, "selected_share": None, "eval_loss_1": None},
}


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"steps": 6}, *(WHOLE | {name: "x"} for name in ("steps", "continued_steps", "eval_loss_1"))],
)
def test_a_damaged_summary_is_one_line(content: Any, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(WHOLE))
    assert read_summary(tmp_path, tmp_path, 0) == WHOLE | {"continued_steps": 0}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"summary.json: is damaged \(.*\); restore it, or remove it"):
        read_summary(tmp_path, tmp_path, 0)
