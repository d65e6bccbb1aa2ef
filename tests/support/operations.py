"""Public operations on a shard set that need no model, for tests with hostile sets."""

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path

from weighted_mtp.pipelines import inspect, verify, weights
from weighted_mtp.pipelines import list as list_command
from weighted_mtp.schemas.configs import (
    InspectConfig,
    ListConfig,
    ScoreConfig,
    VerifyConfig,
    WeightsConfig,
    WeightsReportConfig,
)
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.upgrade import upgrade
from weighted_mtp.scoring.imports.run import add_columns
from weighted_mtp.scoring.job.run import score
from weighted_mtp.training.data.packed_rows import packed_rows

FORMULAS = (
    "normalise(top(abs(gain), 0.6))",
    "relu(standardise(reward, by=group)) + rank(loss_a, by=sequence)",
    "softmax(loss_a - loss_b) * (loss_a > 1)",
)
NEW = "new"
"""Directory beside the set for what an operation writes."""


def open_set(path: Path, good: Path) -> None:
    """Open a set, show it, and read all its sequences."""
    opened = ShardSet.open(path)
    repr(opened), opened._repr_html_(), opened.value_counts(), opened.bytes_per_token()
    for sequence in opened.sequences():
        assert len(sequence.input_ids)


def inspect_set(path: Path, good: Path) -> None:
    """Inspect a set with and without scores."""
    inspect.run(InspectConfig(set=path, samples=2))
    inspect.run(InspectConfig(set=path, samples=1, column="loss_b"))


def show_weights(path: Path, good: Path) -> None:
    """Show the weights of a scheme with all kinds of columns."""
    for formula in FORMULAS:
        weights.run(WeightsReportConfig(set=(path,), weights=WeightsConfig(formula=formula)))


def mix(path: Path, good: Path) -> None:
    """Show the weights of a mixture."""
    scheme = WeightsConfig(preset="dense", column="gain", control="shuffled")
    weights.run(WeightsReportConfig(set=(good,), mix={str(path): 0.5}, weights=scheme, samples=0))


def verify_set(path: Path, good: Path) -> None:
    """Verify a set."""
    verify.run(VerifyConfig(set=path))


def list_sets(path: Path, good: Path) -> None:
    """List the directory of a set."""
    list_command.run(ListConfig(directories=[path.parent]))


def pack_zipped(path: Path, good: Path) -> None:
    """Pack rows of the set zipped with the good one, as training does."""
    for sets in ((path, good), (good, path)):
        rows = packed_rows(sets, weights={"formula": FORMULAS[1]}, sequence_length=5, batch_size=2)
        list(islice(rows, 3))


def subtract(path: Path, good: Path) -> None:
    """Add a contrast of stored columns, which needs no model."""
    score(ScoreConfig(input=path, output=path.parent / NEW, contrasts={"more": "loss_a - gain"}))


def import_columns(path: Path, good: Path) -> None:
    """Add columns for the documents of the good set."""
    rows = [{"document_id": f"doc-{number}", "price": number, "kind": "a"} for number in range(5)]
    add_columns(path, path.parent / NEW, rows)


def upgrade_set(path: Path, good: Path) -> None:
    """Upgrade a set of the older format."""
    upgrade(path, path.parent / NEW)


OPERATIONS: tuple[Callable[[Path, Path], None], ...] = (
    open_set,
    inspect_set,
    show_weights,
    mix,
    verify_set,
    list_sets,
    pack_zipped,
    subtract,
    import_columns,
    upgrade_set,
)


def shown_by(operation: Callable[[Path, Path], None], path: Path, good: Path) -> str:
    """What an operation prints. It may raise; what it wrote is removed."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            operation(path, good)
    finally:
        shutil.rmtree(path.parent / NEW, ignore_errors=True)
    return shown.getvalue()
