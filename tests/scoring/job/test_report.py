"""What a scoring run reports to a caller that does not listen."""

import logging

import pytest

from weighted_mtp.scoring.job.report import Progress, Report


def test_warnings_and_incidents_are_logged_and_the_rest_is_ignored(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("weighted_mtp"), "handlers", [])  # those of commands in this process
    report = Report()
    report.start([], set(), 1)
    report.progress(Progress(units=1, tokens=10, rejects=0, workers=1))
    report.warning("50 % of the tokens have no context")
    report.incident("worker 1 was lost")
    assert caplog.record_tuples == [
        ("weighted_mtp", 30, "50 % of the tokens have no context"),
        ("weighted_mtp", 30, "worker 1 was lost"),
    ]
    assert capsys.readouterr() == ("", "")
