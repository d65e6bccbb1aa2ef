"""Surroundings of a command: streams, directories and memory that a shell or a container withholds."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.schemas.storage.locations import cache_directory

FULL = "standard output: No space left on device; free some space and rerun the same command"


def wmtp(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weighted_mtp", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **settings)


@pytest.fixture
def tokens(make_shard_set: Callable[..., ShardSet]) -> str:
    return str(make_shard_set([[1, 2, 3]]).path)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_output_is_named(buffered: bool, tokens: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    for arguments, name in ((["--help"], "wmtp"), (["list", tokens], "wmtp list")):
        with open("/dev/full", "w") as full:
            run = wmtp(*arguments, stdout=full, env=environment)
        assert (run.returncode, run.stderr) == (1, f"{name}: error: {FULL}\n")


def test_a_full_stderr_loses_messages_only() -> None:
    with open("/dev/full", "wb") as full:
        run = subprocess.run([sys.executable, "-m", "weighted_mtp", "unknown"], stderr=full, check=False)
    assert run.returncode == 2


def test_what_only_prints_needs_an_output(tokens: str) -> None:
    for arguments in (["--help"], ["list", tokens]):
        command = ["sh", "-c", 'exec "$0" -m weighted_mtp "$@" >&-', sys.executable, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = "standard output: Bad file descriptor; open it, or redirect it to a file or to /dev/null"
        assert (run.returncode, run.stderr.partition(": error: ")[2]) == (1, f"{reason}\n")


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams(closed: tuple[int, ...], tokens: str, tmp_path: Path) -> None:
    """Nothing that is printed lands in a file that got the number of a closed stream."""
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"document_id": "doc-0", "start": 0, "mine": [1, 2, 3]}')
    command = f"import --input {tokens} --scores {scores} --output {tmp_path}/scored"
    script = "import os, sys\nfor number in map(int, sys.argv.pop(1).split()): os.close(number)\n"
    script += "os.execv(sys.executable, [sys.executable, '-m', 'weighted_mtp', *sys.argv[1:]])"
    streams = " ".join(map(str, closed))
    run = subprocess.run([sys.executable, "-c", script, streams, *command.split()], capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    scored = ShardSet.open(tmp_path / "scored")
    assert [check.fault for check in verify(scored.path, scored.manifest) if check.fault] == []


def test_an_output_that_cannot_show_a_character(tokens: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    other = Path(tokens).rename(Path(tokens).with_name("café"))
    run = wmtp("list", str(other), stdout=subprocess.PIPE, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert "caf\\xe9" in run.stdout


def test_little_address_space_is_one_line(tokens: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """600 MB hold Python and pyarrow, but not torch."""
    arguments = ["train", "--input", tokens, "--model", str(make_model()), "--output", str(tmp_path / "run")]
    limit = 600 << 20
    run = wmtp(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert run.returncode == 1
    assert run.stderr.startswith("wmtp train: error: a library cannot be loaded (")
    assert run.stderr.endswith("; install the package again, or raise the limit of 'ulimit -v' if one is set\n")
    assert run.stderr.count("\n") == 1


def test_a_shard_that_memory_cannot_hold_is_not_damaged(make_shard_set: Callable[..., ShardSet]) -> None:
    path = make_shard_set([[1] * 1_000_000]).path
    script = (
        "import resource, sys\n"
        "from weighted_mtp.schemas.shard_set.shard_set import ShardSet\n"
        "shards = ShardSet.open(sys.argv[1])\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used, used))\n"
        "shards.read(0)\n"
    )
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # the others reserve address space
    command = [sys.executable, "-c", script, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 1
    assert "damaged" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert "failed" in last.lower(), last


@pytest.mark.parametrize(
    "starts",
    [
        "from weighted_mtp.scoring.corpus.process_pool import start_server; start_server()",
        pytest.param(
            "from weighted_mtp.scoring.job.ray_cluster import ray_session\nwith ray_session(None): pass",
            marks=pytest.mark.integration,
        ),
    ],
    ids=["processes", "ray"],
)
def test_a_long_path_of_temporary_files(starts: str, tmp_path: Path) -> None:
    """The path of a socket has at most 107 bytes."""
    path = tmp_path / ("x" * 120)
    path.mkdir()
    command = [sys.executable, "-c", starts]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(path)})
    message = f"{path}: too long a path for sockets; set TMPDIR to a shorter directory for temporary files"
    assert run.stderr.splitlines()[-1] == f"weighted_mtp.schemas.errors.UserError: {message}"


@pytest.mark.integration
def test_a_working_directory_that_is_not_utf8(tmp_path: Path) -> None:
    script = "from weighted_mtp.scoring.job.ray_cluster import ray_session\nwith ray_session(None): pass"
    path = tmp_path / "caf\udce9"
    path.mkdir()
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path)
    last = run.stderr.splitlines()[-1]
    assert last.endswith("not allowed); use a working directory and a TMPDIR with names in UTF-8"), last


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError, match="set HOME or XDG_CACHE_HOME"):
        cache_directory()
    with pytest.raises(ValueError, match=r"no home directory for '~'; write './~/set'"):
        ScoreConfig(input="~/set", output="scored", reference="model")
