"""The entry point: exit statuses, interruptions and closed streams."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weighted_mtp.schemas.configs import Config
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

SCORE = ["score", "--input", "a", "--output", "b", "--reference", "c"]


def test_an_interrupted_run_says_how_to_go_on(
    replace_command: Callable[..., None], complaint: Callable[[list[str], int], str]
) -> None:
    def interrupt(_: Config) -> None:
        raise KeyboardInterrupt

    replace_command("score", interrupt)
    assert complaint(SCORE, 130) == "wmtp score: interrupted; rerun the same command to finish it"
    replace_command("verify", interrupt)
    assert complaint(["verify", "corpus"], 130) == "wmtp verify: interrupted"


def test_the_reason_why_a_library_cannot_be_loaded(
    replace_command: Callable[..., None],
    complaint: Callable[[list[str], int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(_: str) -> None:
        raise ModuleNotFoundError("Could not import module 'Model'") from OSError("cannot map libmodel.so")

    replace_command("score", lambda config: None)
    monkeypatch.setattr("importlib.import_module", load)
    line = complaint(SCORE, 1)
    assert line.startswith(
        "wmtp score: error: a library cannot be loaded (cannot map libmodel.so); install the package"
    )


def test_the_console_script_of_a_set_that_is_not_there() -> None:
    wmtp = Path(sys.executable).with_name("wmtp")
    run = subprocess.run([wmtp, "verify", "nowhere"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == (
        "wmtp verify: error: nowhere: no such shard set; check the path or write it with 'wmtp prepare'\n"
    )


def test_a_closed_pipe_is_quiet(make_shard_set: Callable[..., ShardSet]) -> None:
    path = make_shard_set([[1, 2]]).path
    for arguments in (["--help"], ["list", str(path)]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "weighted_mtp", *arguments]
        run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (run.returncode, run.stderr) == (1, "")


def test_the_module_is_the_command() -> None:
    wmtp = str(Path(sys.executable).with_name("wmtp"))
    for arguments in (["--version"], ["--help"]):
        shown = [
            subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout
            for command in ([wmtp], [sys.executable, "-m", "weighted_mtp"])
        ]
        assert shown[0] == shown[1]
        assert shown[0].removeprefix("usage: ").startswith("wmtp ")
