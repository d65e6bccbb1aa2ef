"""The demo with a few steps."""

from pathlib import Path

import pytest

from weighted_mtp.pipelines import demo
from weighted_mtp.schemas.configs import DemoConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet


@pytest.mark.slow
def test_the_demo_runs_and_a_second_run_finds_everything_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DemoConfig(output=tmp_path / "demo", base_steps=3, reference_steps=2, student_steps=2)
    demo.run(config)
    report = capsys.readouterr().out
    for row in ("base", "reference", *demo.ARMS):
        assert row in report
    scored = ShardSet.open(tmp_path / "demo" / "scored")
    assert list(scored.manifest.columns) == ["loss_reference", "loss_base", "excess_loss"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "models").rglob("*.safetensors")}
    demo.run(config)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_demo_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "config").mkdir()
    with pytest.raises(UserError, match="already holds something else; choose another --output"):
        demo.run(DemoConfig(output=tmp_path))
