"""`make gpu`: its steps end in time, are recorded, and are not repeated; a rehearsal runs all of them on the CPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from weighted_mtp.scoring.engines.choice import runs_on_gpu

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"
MARK = "WMTP_TEST_MARK"
PART_SECONDS = 540
SLOWER = 10
"""Time limits of a rehearsal in these tests, times those on a GPU: the machine may be busy."""
GONE_SECONDS = 60
ARGUMENTS = argparse.Namespace(rehearse=True, time_factor=1.0)
MACHINE = {"device": None, "cuda": None, "python": "3", "versions": {"torch": "2"}}

FIGURES = """
import json, sys
from pathlib import Path
Path(sys.argv[-1]).write_text(json.dumps({"rows": [{"name": "one", "seconds": [1.0, 3.0, 2.0], "utilisation": 0.4}]}))
"""
FAILS = "print('first line'); raise SystemExit('why it failed')"
SLEEPS = """
import subprocess, sys
print("begins", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of the runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        names = ("steps", "results", "run")
        yield SimpleNamespace(**{name: import_module(name) for name in names})
        for name in names:
            del sys.modules[name]


@pytest.fixture
def run_step(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`run_step(name, code, limit)` runs a step with this code in place of a benchmark, and returns its record."""
    monkeypatch.setenv(MARK, str(tmp_path))

    def run(name: str, code: str, limit: int = 60, machine: dict[str, Any] = MACHINE) -> Any:
        script = tmp_path / f"{name}.py"
        script.write_text(code)
        step = gpu.steps.Step(name, 1, limit, str(script))
        monkeypatch.setattr(gpu.results, "STEPS", (step,))
        return gpu.run.run(step, tmp_path, dict(os.environ), machine, ARGUMENTS)

    return run


def remaining(mark: str) -> list[psutil.Process]:
    """Processes that got this mark in their environment, other than this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def wait_until_gone(mark: str) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while left := remaining(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_part_takes_at_most_nine_minutes(gpu: SimpleNamespace) -> None:
    steps = gpu.steps.STEPS
    for part in gpu.steps.PARTS:
        assert sum(step.limit for step in steps if step.part == part) <= PART_SECONDS
    assert [step.part for step in steps] == sorted(step.part for step in steps)
    assert len({step.name for step in steps}) == len(steps)
    assert all((ROOT / step.script).exists() for step in steps)


def test_figures_are_recorded_and_a_finished_step_does_not_run_again(
    run_step: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_step("figures", FIGURES)
    assert record.status == "done"
    table = (tmp_path / "table.md").read_text()
    assert "| figures | done | 0 | one | 2.0000 s, MFU 40.0 % |" in table
    assert run_step("figures", FAILS) == record, "it would fail"
    other = MACHINE | {"versions": {"torch": "3"}}
    assert run_step("figures", FAILS, machine=other).status == "failed"


def test_a_step_that_fails_is_recorded_and_runs_again(run_step: Callable[..., Any], tmp_path: Path) -> None:
    record = run_step("fails", FAILS)
    assert (record.status, record.rows) == ("failed", [])
    assert record.log == ["first line", "why it failed"]
    assert "| fails | failed | 0 |  | why it failed |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "fails.json").read_text())["settings"] == record.settings
    assert run_step("fails", FIGURES).status == "done"


def test_a_step_over_its_limit_ends_with_its_children(run_step: Callable[..., Any], tmp_path: Path) -> None:
    record = run_step("sleeps", SLEEPS, limit=2)
    assert (record.status, record.log) == ("timed out", ["begins"])
    assert 2 <= record.seconds < 60
    assert not remaining(str(tmp_path))


def test_outcomes_of_tests_are_rows(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase name="a" time="1.5"><properties><property name="rms" value="0.1"/>'
        '</properties></testcase><testcase name="b" time="0"><skipped message="no&#10;flash"/></testcase>'
        '<testcase name="c" time="0"><failure message="assert 1 | 2"/></testcase></testsuite></testsuites>'
    )
    rows = gpu.results.read_rows(gpu.steps.Step("t", 1, 1, "tests/x.py"), path)
    words = [gpu.results.figures_of(row) for row in rows]
    assert words == ["passed, rms 0.1", "skipped, no", "failed, assert 1 | 2"]
    assert gpu.results.status_of(1, rows) == "failed"
    assert gpu.results.status_of(0, rows[:2]) == "done"
    assert gpu.results.status_of(0, rows[1:2]) == "skipped"
    assert gpu.results.status_of(None, rows) == "timed out"


def test_errors_of_benchmarks_are_outcomes(gpu: SimpleNamespace) -> None:
    errors = [{"engine": "pooler", "error": error} for error in ("it broke", "vLLM is not installed")]
    broken, missing = map(gpu.results.benchmark_row, errors)
    loop = {"engine": "loop", "seconds": [1.0]}
    assert gpu.results.benchmark_row(loop) == loop
    assert gpu.results.status_of(0, [loop, broken]) == "failed"
    assert gpu.results.status_of(0, [loop, missing]) == "done"
    assert gpu.results.status_of(0, [missing]) == "skipped"
    assert gpu.results.figures_of(missing) == "skipped, vLLM is not installed"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """`start(*arguments)` starts a rehearsal with its results in `tmp_path / "gpu"`."""

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), "--rehearse", "--output", str(tmp_path / "gpu"), *arguments]
        environment = os.environ | {MARK: str(tmp_path)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_steps(number: int, start: Callable[..., Any], tmp_path: Path) -> None:
    process = start("--only", "scoring")
    assert "scoring: started" in process.stdout.readline()
    process.send_signal(number)
    assert process.wait(GONE_SECONDS) == 128 + number
    assert process.stdout.read() == ""
    wait_until_gone(str(tmp_path))
    assert not (tmp_path / "gpu" / "scoring.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(runs_on_gpu("vllm"), reason="the installed vLLM runs on a GPU only")
def test_a_rehearsal_runs_every_step(start: Callable[..., Any], gpu: SimpleNamespace, tmp_path: Path) -> None:
    names = [step.name for step in gpu.steps.STEPS]
    process = start("--time_factor", str(SLOWER))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    records = {name: json.loads((tmp_path / "gpu" / f"{name}.json").read_text()) for name in names}
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(names, "done")
    assert all(record["rows"] for record in records.values())
    table = (tmp_path / "gpu" / "table.md").read_text()
    assert all(f"| {name} | done |" in table for name in names)
    assert table in printed
    wait_until_gone(str(tmp_path))
    skipped = [row for record in records.values() for row in record["rows"] if row.get("outcome") == "skipped"]
    assert all("is not installed" in row["reason"] or "needs a GPU" in row["reason"] for row in skipped)

    again = start("--time_factor", str(SLOWER))
    printed, _ = again.communicate()
    assert again.returncode == 0
    assert [line for line in printed.splitlines() if ": started" in line] == []
    assert [line for line in printed.splitlines() if line.endswith(": done before")] == [
        f"{name}: done before" for name in names
    ]
