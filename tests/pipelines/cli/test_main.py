"""The entry point: exit statuses, interruptions and closed streams."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from weighted_mtp.schemas.configs import Config

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


def test_the_console_script_of_a_set_that_is_not_there() -> None:
    wmtp = Path(sys.executable).with_name("wmtp")
    run = subprocess.run([wmtp, "verify", "nowhere"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == (
        "wmtp verify: error: nowhere: no such shard set; check the path or write it with 'wmtp prepare'\n"
    )


def test_a_closed_pipe_is_quiet() -> None:
    script = (
        "import sys, types; from weighted_mtp.pipelines.cli.main import main\n"
        "module = types.ModuleType('weighted_mtp.pipelines.verify')\n"
        "module.run = lambda config: print('line\\n' * 100_000)\n"
        "sys.modules['weighted_mtp.pipelines.verify'] = module\n"
        "sys.exit(main(['verify', 'corpus']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
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
