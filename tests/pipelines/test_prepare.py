import json
import re
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


def test_the_summary_says_what_was_left_out_and_what_special_tokens_became(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus").mkdir()
    for name, text in {"a.txt": "<s>a", "b.txt": "page </s>", "notes.md": "x", "x.bin": "x"}.items():
        (tmp_path / "corpus" / name).write_text(text)
    settings = {"input": str(tmp_path / "corpus"), "tokenizer": str(tokenizer_dir), "bos": "always", "workers": 1}
    run(PrepareConfig(output=tmp_path / "parsed", **settings))
    printed = capsys.readouterr().out
    assert re.search(r"files +│ 2 ", printed)
    assert "\nleft out 2 files (1 .md, 1 .bin): notes.md, x.bin\n" in printed
    assert "in the text of 2 of the documents, where they became control tokens" in printed
    assert re.search(r"two BOS +│ at the start of 1 of the documents; see --special_tokens and --bos", printed)
    run(PrepareConfig(output=tmp_path / "text", special_tokens="text", **settings))
    printed = capsys.readouterr().out
    assert "where they became ordinary text" in printed
    assert "two BOS" not in printed
    run(
        PrepareConfig(
            output=tmp_path / "one", **settings | {"input": str(tmp_path / "corpus" / "notes.md"), "format": "text"}
        )
    )
    printed = capsys.readouterr().out
    assert not re.search("left out|special tokens|two BOS", printed)
