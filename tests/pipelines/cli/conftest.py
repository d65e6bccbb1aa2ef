"""Fixtures that run the command line with replaced commands."""

import os
import sys
import types
from collections.abc import Callable, Iterator

import pytest

from weighted_mtp import pipelines
from weighted_mtp.pipelines.cli import early_checks
from weighted_mtp.pipelines.cli.main import MODULES, main
from weighted_mtp.schemas.configs import Config


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("WMTP_DEBUG", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def replace_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Config], None]], None]:
    """`replace_command(command, run)` replaces the early checks and the `run` function of a command."""

    def replace(command: str, run: Callable[[Config], None]) -> None:
        name = MODULES.get(command, command)
        module = types.ModuleType(f"weighted_mtp.pipelines.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setattr(early_checks, "check_early", lambda config: None)
        monkeypatch.setitem(sys.modules, f"weighted_mtp.pipelines.{name}", module)
        monkeypatch.setattr(pipelines, name, module, raising=False)

    return replace


@pytest.fixture
def configured(replace_command: Callable[..., None]) -> Callable[[list[str]], Config]:
    """`configured(arguments)` are the settings that the command receives."""

    def parse(arguments: list[str]) -> Config:
        seen: list[Config] = []
        replace_command(arguments[0], seen.append)
        assert main(arguments) == 0
        return seen[0]

    return parse


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], int], str]:
    """`complaint(arguments, status)` is the single line on stderr of a command line that fails with that status."""

    def run(arguments: list[str], status: int) -> str:
        assert main(arguments) == status
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert len(lines) == 1
        return lines[0]

    return run
