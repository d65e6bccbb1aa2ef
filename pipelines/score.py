"""`wmtp score`: scores token shards, with a progress bar and a summary."""

import sys
import time
from types import TracebackType

from weighted_mtp.pipelines.reports.console import new_console
from weighted_mtp.pipelines.reports.score_summary import Scored, print_dry_run, print_summary
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.progress import ProgressBar
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.text import printable
from weighted_mtp.scoring.job.report import Progress, Report
from weighted_mtp.scoring.job.run import dry_run, score


def run(config: ScoreConfig) -> ShardSet | None:
    """Score a shard set and print a summary; with `dry_run`, only print the planned work, and return None.

    Raises:
        UserError: the input, a model, the output or the machine is unsuitable.
    """
    with ScoreDisplay() as display:
        if config.dry_run:
            if planned := dry_run(config, display):
                print_dry_run(planned)
            return None
        shards = score(config, display)
    if not display.complete:
        print_summary(shards, display.scored())
    return shards


class ScoreDisplay(Report):
    """Shows a scoring run on the terminal and counts for the summary. A context manager that closes the bar."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.complete = False
        self.shards = self.done = self.tokens = self.max_workers = self.incidents = 0
        self.started_at = self.progress_at = 0.0

    def __enter__(self) -> "ScoreDisplay":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def warning(self, message: str) -> None:
        """Print a warning."""
        print(f"wmtp score: warning: {printable(message)}", file=sys.stderr)

    def already_complete(self, shards: ShardSet) -> None:
        """Print the size and columns of the finished set."""
        manifest = shards.manifest
        self.complete = True
        columns = ", ".join(manifest.columns)
        new_console().print(f"{shards.path} is already complete: {manifest.tokens:,} tokens, {columns}")

    def start(self, shards: list[ShardEntry], done: set[str], max_workers: int) -> None:
        """Open the bar if any shards remain to be scored."""
        self.shards, self.done, self.max_workers = len(shards), len(done), max_workers
        total = sum(shard.tokens for shard in shards)
        self.tokens = sum(shard.tokens for shard in shards if shard.name not in done)
        if len(done) < len(shards):
            self.bar = ProgressBar(
                total=total, initial=total - self.tokens, unit="tokens", unit_scale=True, desc="scoring"
            )
            self.bar.set_postfix_str(f"{self.done}/{self.shards} shards, loading models")

    def progress(self, progress: Progress) -> None:
        """Advance the bar, ignoring the time before the first worker is ready."""
        assert self.bar is not None
        self.progress_at = time.monotonic()
        if not self.started_at and progress.workers:
            self.started_at = self.progress_at
            self.bar.unpause()
        self.bar.n = max(self.bar.n, self.bar.initial + progress.tokens)  # estimates may decrease
        workers = f"{progress.workers} of {self.max_workers} workers" if self.started_at else "loading models"
        state = f"{self.done + progress.units}/{self.shards} shards, {workers}"
        self.bar.set_postfix_str(state + f", {progress.rejects} rejects" * bool(progress.rejects))

    def incident(self, message: str) -> None:
        """Print an incident above the bar."""
        self.incidents += 1
        ProgressBar.write(f"wmtp score: {message}", file=sys.stderr)

    def scored(self) -> Scored:
        """Statistics of the run."""
        return Scored(self.tokens, self.done, self.progress_at - self.started_at, self.incidents)
