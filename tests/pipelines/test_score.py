"""What `wmtp score` shows of the events of a run."""

import pytest

from weighted_mtp.pipelines.reports.score_summary import Scored
from weighted_mtp.pipelines.score import ScoreDisplay
from weighted_mtp.schemas.shard_set.manifest import ShardEntry
from weighted_mtp.scoring.job.report import Progress


@pytest.fixture
def shards() -> list[ShardEntry]:
    sizes = {"rows": 4, "tokens": 100, "longest": 50, "row_groups": 1, "bytes": 1}
    digests = {"sha256": "0" * 64, "footer_sha256": "0" * 64}
    return [ShardEntry(name=name, **sizes, **digests) for name in ("a", "b", "c")]


def test_the_bar_starts_with_what_was_done_before_and_never_goes_back(shards, monkeypatch):
    clock = [5.0]
    monkeypatch.setattr("weighted_mtp.pipelines.score.time.monotonic", lambda: clock[0])
    with ScoreDisplay() as display:
        display.start(shards, {"a"}, max_workers=2)
        assert (display.bar.n, display.bar.total) == (100, 300)
        display.progress(Progress(0, 0, 0, workers=0))
        assert display.bar.postfix == "1/3 shards, loading models"
        clock[0] = 7.0
        display.progress(Progress(0, 80, 0, workers=1))
        display.progress(Progress(0, 40, 0, workers=1))
        assert display.bar.n == 180
        clock[0] = 10.0
        display.progress(Progress(2, 200, 3, workers=2))
        assert display.bar.n == 300
        assert display.bar.postfix == "3/3 shards, 2 of 2 workers, 3 rejects"
        assert display.scored() == Scored(tokens=200, resumed=1, seconds=3.0, incidents=0)


def test_no_bar_where_nothing_is_left_to_score(shards):
    with ScoreDisplay() as display:
        display.start(shards, {"a", "b", "c"}, max_workers=1)
        assert display.bar is None
        assert display.scored() == Scored(resumed=3)


def test_warnings_and_incidents_are_lines_of_stderr(shards, capsys):
    with ScoreDisplay() as display:
        display.warning("slow")
        display.start(shards, set(), max_workers=1)
        display.incident("lost a worker (killed)")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("wmtp score: warning: slow\n")
    assert "wmtp score: lost a worker (killed)\n" in printed.err
    assert display.scored().incidents == 1
