import json
from pathlib import Path

import pytest

from weighted_mtp.pipelines.prepare import run
from weighted_mtp.schemas.configs import PrepareConfig


def test_summary_and_a_finished_set(tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "x" * (row + 1), "reward": row / 8, "prompt": row // 2} for row in range(6)]
    lines = [json.dumps(row) for row in [*rows, {"text": "none"}]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = PrepareConfig(
        input=str(tmp_path / "a.jsonl"),
        tokenizer=str(tokenizer_dir),
        output=tmp_path / "out",
        number_fields=("reward",),
        label_fields=("prompt",),
        workers=1,
    )
    first = run(config)
    printed = capsys.readouterr().out
    assert "reward (number), prompt (label)" in printed
    assert "1 x no field 'reward'" in printed
    assert run(config).manifest == first.manifest
    assert "already complete: 21 tokens" in capsys.readouterr().out
