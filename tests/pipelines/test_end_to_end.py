"""The real command line from a corpus to an evaluated model, every command a process of its own at least once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weighted_mtp.pipelines.cli.main import main
from weighted_mtp.schemas.shard_set.fingerprints import model_fingerprint
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.shards import flat_values, list_lengths

pytestmark = pytest.mark.integration

DOCUMENTS = [f"Document {i} says: " + "the quick brown fox jumps over the lazy dog. " * (i % 7 + 1) for i in range(40)]


def wmtp(*arguments: object) -> str:
    """Run the command as a user does; return what it printed."""
    command = [str(Path(sys.executable).with_name("wmtp")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, make_model: Callable[..., Path]) -> Path:
    """Prepare, score (with vLLM where it is installed) and train, in one directory."""
    root = tmp_path_factory.mktemp("job")
    rows = [json.dumps({"text": text}) for text in DOCUMENTS]
    rows.insert(3, '{"text": 5}')
    rows.insert(7, "{not json")
    (root / "corpus.jsonl").write_text("\n".join(rows))
    reference, base = make_model(seed=0), make_model(seed=1)
    wmtp("prepare", "--input", root / "corpus.jsonl", "--tokenizer", tokenizer_dir, "--output", root / "tokens",
         "--max_length", 256, "--bos", "always", "--shard_tokens", 2500)  # fmt: skip
    wmtp("score", "--input", root / "tokens", "--output", root / "scored", "--reference", reference, "--base", base,
         "--short_context", 64, "--workers", 2)  # fmt: skip
    wmtp("train", "--input", root / "scored", "--model", base, "--output", root / "run", "--max_steps", 5,
         "--sequence_length", 128, "--batch_size", 4, "--heads.offsets", "[1,3]", "--weights.preset", "rho1-static",
         "--eval_input", root / "tokens")  # fmt: skip
    (root / "base").symlink_to(base)
    (root / "reference").symlink_to(reference)
    return root


def test_token_shards_hold_the_corpus(job: Path) -> None:
    tokens = ShardSet.open(job / "tokens")
    assert tokens.manifest.corpus.documents == len(DOCUMENTS)
    assert tokens.manifest.tokens == sum(len(text) + 1 for text in DOCUMENTS)
    assert len(tokens.manifest.shards) > 2
    rejects = [json.loads(line) for line in (job / "tokens" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [3, 7]


def test_scores_are_what_the_models_say(job: Path, vllm_installed: None) -> None:
    scored = ShardSet.open(job / "scored")
    assert list(scored.manifest.columns) == ["loss_reference", "loss_base", "loss_short", "excess_loss", "long_short"]
    assert scored.manifest.columns["loss_base"].origin.engine == "vllm"
    table = scored.read(0)
    for name, column in (("reference", "loss_reference"), ("base", "loss_base")):
        model = AutoModelForCausalLM.from_pretrained(job / name)
        ends = np.cumsum(list_lengths(table["input_ids"]))
        for ids, losses in zip(
            np.split(flat_values(table["input_ids"]), ends[:-1]),
            np.split(flat_values(table[column]), ends[:-1]),
            strict=True,
        ):
            batch = torch.from_numpy(ids.astype(np.int64))[None]
            with torch.inference_mode():
                expected = -model(batch).logits[0, :-1].log_softmax(-1).gather(-1, batch[0, 1:, None])[:, 0]
            assert np.isnan(losses[0])
            np.testing.assert_allclose(losses[1:], expected.numpy(), rtol=2**-11, atol=2**-10 + 1e-4)
    difference = flat_values(table["loss_base"]).astype(np.float32) - flat_values(table["loss_reference"])
    np.testing.assert_allclose(flat_values(table["excess_loss"]), difference, atol=0.02)


def test_inspect_and_verify(job: Path) -> None:
    report = wmtp("inspect", job / "scored", "--html", job / "report.html")
    assert "highest excess_loss" in report
    assert "lazy" in report
    assert "excess_loss" in (job / "report.html").read_text()
    assert "all" in wmtp("verify", job / "scored")


def test_trained_model_is_evaluated_and_loads_in_transformers(job: Path) -> None:
    report = wmtp("evaluate", "--model", job / "run", "--input", job / "tokens")
    summary = json.loads((job / "run" / "summary.json").read_text())
    for offset in (1, 3):
        assert f"{summary[f'eval_loss_{offset}']:.4f}" in report
    model = AutoModelForCausalLM.from_pretrained(job / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(job / "run" / "model")
    assert model(**tokenizer("the quick", return_tensors="pt")).logits.shape[-1] == 260


def test_the_run_and_its_input_are_listed(job: Path) -> None:
    lines = wmtp("list", job).splitlines()
    summary = json.loads((job / "run" / "summary.json").read_text())
    at = next(index for index, line in enumerate(lines) if line.startswith(f"{job}/run: "))
    held_out = f"held-out loss {summary['eval_loss_1']:.5g} (offset 1)"
    assert lines[at].startswith(f"{job}/run: training run, 5 of 5 steps, loss {summary['loss']:.5g}, {held_out}, ")
    assert lines[at + 1] == f"    input  {job / 'scored'}"


@pytest.mark.slow
def test_the_run_is_a_reference(job: Path) -> None:
    wmtp("score", "--input", job / "tokens", "--output", job / "by-run", "--reference", job / "run",
         "--engine", "transformers")  # fmt: skip
    column = ShardSet.open(job / "by-run").manifest.columns["loss_reference"]
    assert column.origin.model == str(job / "run" / "model")
    assert column.origin.fingerprint == model_fingerprint(job / "run" / "model")


def test_repeating_a_finished_command_does_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (job / "scored").iterdir()}
    words = ["score", "--input", job / "tokens", "--output", job / "scored", "--reference", job / "reference",
             "--base", job / "base", "--short_context", 64]  # fmt: skip
    assert main(list(map(str, words))) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (job / "scored").iterdir()}


@pytest.mark.parametrize(
    ("damage", "command", "message"),
    [
        ("truncate", "train", "truncated or replaced"),
        ("manifest", "train", "was changed after it was written"),
        ("remove", "inspect", "shard is missing"),
    ],
)
def test_damaged_sets_are_refused_in_one_line(
    damage: str, command: str, message: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "scored"
    subprocess.run(["cp", "-r", job / "scored", copy], check=True)
    shard = sorted(copy.glob("data/shard-*"))[1]
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "remove":
        shard.unlink()
    else:
        manifest = copy / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"subtrahend": "loss_reference"', '"subtrahend": "loss_base"'))
    settings = (
        [copy] if command == "inspect" else ["--input", copy, "--model", job / "base", "--output", tmp_path / "r"]
    )
    assert main([command, *map(str, settings)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()
