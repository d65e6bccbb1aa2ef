"""Fuzzing of sets, settings, formulas, corpora and score files, each in a process of its own.

`FUZZ_SECONDS` in the environment sets the time for all targets together; the default is ten minutes. `FUZZ_SEED` starts
with another seed.
"""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
SEED = os.environ.get("FUZZ_SEED", "0")
SHARES = {"sets": 0.5, "old_sets": 0.1, "corpora": 0.2, "formulas": 0.1, "settings": 0.1}


def run(target: str, directory: Path, seconds: float) -> tuple[int, str]:
    """Exit status of the process that fuzzes a target, and what it wrote, with the case that ended it."""
    log = directory / "work" / "case"
    command = [sys.executable, fuzz.__file__, target, str(directory), str(log), SEED, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 600)
    last = log.read_text() if done.returncode else ""
    return done.returncode, f"{done.stdout[-3000:]}\n{done.stderr[-8000:]}\nlast case: {last}"


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARES)
def test_only_user_errors(target: str, directory: Path) -> None:
    status, shown = run(target, directory, SECONDS * SHARES[target])
    assert status == 0, shown


@pytest.mark.integration
@pytest.mark.slow
def test_a_crash_of_the_interpreter_names_its_case(directory: Path) -> None:
    status, shown = run("crash", directory, 1)
    assert status != 0
    assert "last case: 'a case of crash'" in shown
