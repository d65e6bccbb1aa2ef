"""A signal ends any command at any moment with one line and the status of shells, and nothing of it is left running."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from weighted_mtp.schemas.shard_set.shard_set import ShardSet

SECONDS = 60.0
MARK = "WMTP_TEST_MARK"
SENDS = """
import os, sys

class Finder:
    def find_spec(name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder)
sys.argv = ["wmtp", *{arguments!r}]
from weighted_mtp.__main__ import main
main()
"""
"""A command that sends itself a signal when it imports a module."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["weighted_mtp.pipelines.cli.main", "pydantic", "pyarrow", "torch"])
def test_during_imports(number: int, module: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    output = tmp_path / "tokens"
    arguments = ["prepare", "--input", str(corpus), "--tokenizer", str(tokenizer_dir), "--output", str(output)]
    script = SENDS.format(module=module, number=int(number), arguments=arguments)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (128 + number, "", "wmtp: interrupted\n")
    assert not output.exists()


@pytest.fixture
def commands(
    tmp_path: Path,
    make_shard_set: Callable[..., ShardSet],
    make_model: Callable[..., Path],
    tokenizer_dir: Path,
    vllm_installed: None,
) -> dict[str, list[str]]:
    """Arguments of each command, each with work for a minute or more."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some text that is repeated\n" * 2_000_000)
    shards = str(make_shard_set([list(range(200))] * 20_000, rows_per_shard=100).path)
    model = str(make_model())
    to = ["--output", str(tmp_path / "output")]
    train = ["train", "--input", shards, "--model", model, "--max_steps", "100000", *to]
    score = ["score", "--input", shards, "--reference", model, *to]
    prepare = ["prepare", "--input", str(corpus), "--sample_by", "line", "--tokenizer", str(tokenizer_dir), *to]
    return {
        "help": ["--help"],
        "prepare": [*prepare, "--workers", "2"],
        "transformers": [*score, "--engine", "transformers"],
        "vllm": [*score, "--engine", "vllm"],
        "train": train,
        "ray": [*train, "--ray_workers", "2"],
    }


def marked(mark: str) -> Iterator[psutil.Process]:
    """All processes with this mark in their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def handles_signals(process: subprocess.Popen) -> bool:
    """Whether a process catches SIGTERM, or has ended."""
    if process.poll() is not None:
        return True
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "delays"),
    [
        ("help", [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        ("prepare", [0.5, 3.0, 4.5, 5.0, 6.0, 8.0]),
        ("transformers", [2.0, 5.0, 6.5, 8.0, 10.0, 15.0]),
        ("vllm", [6.0, 9.0, 12.0, 16.0, 25.0]),
        ("train", [1.0, 4.0, 6.0, 9.0]),
        ("ray", [5.0, 8.0, 11.0, 15.0, 25.0]),
    ],
)
def test_sweep(name: str, delays: list[float], commands: dict[str, list[str]]) -> None:
    """Ctrl-C goes to all processes of a terminal, SIGTERM to the command."""
    for round, delay in enumerate(delays):
        for number in [(signal.SIGINT, signal.SIGTERM)[round % 2]]:
            mark = uuid4().hex
            process = subprocess.Popen(
                [sys.executable, "-m", "weighted_mtp", *commands[name]],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, MARK: mark},
                start_new_session=True,
            )
            wait_until(lambda process=process: handles_signals(process))
            time.sleep(delay)
            if process.poll() is None:
                (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            _, printed = process.communicate(timeout=SECONDS)
            where = f"{name} after {delay} s: {printed}"
            assert process.returncode in ({0, 128 + number} if name == "help" else {128 + number}), where
            lines = [line for line in printed.splitlines() if not re.match("(scoring|train|prepare): ", line)]
            assert len(lines) == (process.returncode != 0), where
            assert all(re.match("wmtp( \\w+)?: interrupted", line) for line in lines), where
            wait_until(lambda mark=mark: not list(marked(mark)))
