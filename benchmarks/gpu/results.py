"""Records of the steps, and the table of their figures."""

import json
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

from steps import STEPS, Step

FINISHED = ("done", "skipped")
UNITS = {
    "tokens_per_second": ("{:,.0f} tokens/s", 1),
    "tokens_per_cpu_second": ("{:,.0f} tokens per CPU second", 1),
    "utilisation": ("MFU {:.1f} %", 100),
    "peak_bytes": ("peak {:.2f} GiB", 2**-30),
    "above_loaded_bytes": ("{:.2f} GiB above loaded", 2**-30),
    "largest_difference": ("largest difference {:.1e} nats", 1),
    "waiting_share": ("waits {:.2f} % of the time", 100),
}
"""How the table shows a number of a benchmark, and its factor. It shows no others, except seconds."""
NOT_SHOWN = ("test", "engine", "outcome", "reason", "seconds", "log")
MISSING = "is not installed"
MOST_LINES = 20
"""Lines of the log in the record of a step that failed."""


class Record(NamedTuple):
    """What is known of a step that ran, as in its JSON file.

    Attributes:
        step: its name.
        part: the number of its part.
        status: `done`, `skipped` (all its tests or rows were), `failed` or `timed out`.
        seconds: how long it took.
        limit: seconds it was given.
        settings: command, versions and device; a step with the same settings does not run again.
        rows: figures, one dictionary for each test or row of a benchmark.
        log: the last lines of its output, if it did not finish.
    """

    step: str
    part: int
    status: str
    seconds: float
    limit: float
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    log: list[str]


def write_atomically(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def write_record(directory: Path, record: Record) -> None:
    """Write the record of a step to its file."""
    write_atomically(directory / f"{record.step}.json", json.dumps(record._asdict(), indent=2) + "\n")


def read_record(directory: Path, step: Step) -> Record | None:
    """The record of a step, None if it has not run."""
    path = directory / f"{step.name}.json"
    return Record(**json.loads(path.read_text())) if path.exists() else None


def read_rows(step: Step, figures: Path) -> list[dict[str, Any]]:
    """The rows of a step, empty if it wrote none."""
    if not figures.exists():
        return []
    if not step.is_test:
        return [benchmark_row(row) for row in json.loads(figures.read_text())["rows"]]
    return [test_row(case) for case in ET.parse(figures).getroot().iter("testcase")]


def benchmark_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a benchmark; with an outcome and a reason in place of an error."""
    reason = row.pop("error", None)
    if reason is None:
        return row
    return row | {"outcome": "skipped" if reason.endswith(MISSING) else "failed", "reason": reason}


def test_row(case: ET.Element) -> dict[str, Any]:
    """Name, outcome, seconds, reason and recorded properties of a test in JUnit XML."""
    row: dict[str, Any] = {"test": case.get("name"), "outcome": "passed", "seconds": [float(case.get("time", 0))]}
    for tag, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (found := case.find(tag)) is not None:
            row |= {"outcome": outcome, "reason": (found.get("message") or "").splitlines()[0]}
    return row | {item.get("name", ""): item.get("value") for item in case.iter("property")}


def status_of(code: int | None, rows: list[dict[str, Any]]) -> str:
    """Status of a step from its exit status (None: ended at its limit) and its rows."""
    if code is None:
        return "timed out"
    outcomes = {row.get("outcome") for row in rows}
    if code or "failed" in outcomes:
        return "failed"
    return "skipped" if outcomes == {"skipped"} else "done"


def table(directory: Path) -> str:
    """The figures of all steps that ran, as a table in Markdown, after a line for each device and its packages."""
    records = [record for step in STEPS if (record := read_record(directory, step))]
    lines = [*dict.fromkeys(machine_of(record) for record in records), ""]
    lines += ["| step | status | seconds | test or row | figures |", "|---|---|---|---|---|"]
    for record in records:
        rows = [(name_of(row), figures_of(row)) for row in record.rows] or [("", " ".join(record.log[-1:]))]
        for number, (name, figures) in enumerate(rows):
            first = (record.step, record.status, f"{record.seconds:.0f}") if number == 0 else ("", "", "")
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in (*first, name, figures))} |")
    return "\n".join(lines) + "\n"


def machine_of(record: Record) -> str:
    """Device and versions of the installed packages."""
    device = record.settings["device"] or "CPU, in small, with sdpa in the place of flash attention"
    versions = (f"{name} {version}" for name, version in record.settings["versions"].items() if version)
    return f"{device}; Python {record.settings['python']}, {', '.join(versions)}"


def name_of(row: dict[str, Any]) -> str:
    """Name of a row: its first value."""
    return str(next(iter(row.values())))


def short(value: Any) -> str:
    """A value in at most three digits if it is a number, else as it is."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return str(value)


def figures_of(row: dict[str, Any]) -> str:
    """Figures of a row, in words."""
    if "outcome" in row:
        first = [row[key] for key in ("outcome", "reason") if key in row]
        return ", ".join([*first, *(f"{key} {short(value)}" for key, value in row.items() if key not in NOT_SHOWN)])
    found = [form.format(row[key] * factor) for key, (form, factor) in UNITS.items() if key in row]
    if "seconds" in row:
        found.insert(0, f"{statistics.median(row['seconds']):.4f} s")
    return ", ".join(found)
