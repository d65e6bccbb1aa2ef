"""Progress: a bar on a terminal, few plain lines in a log."""

import io
import re
import sys

import pytest

from weighted_mtp.schemas import progress
from weighted_mtp.schemas.progress import ProgressBar, hidden_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(to: int = 9) -> None:
    with ProgressBar(total=to, unit="tokens", desc="scoring", mininterval=0) as bar:
        for number in range(to):
            bar.update()
            bar.set_postfix_str(f"{number} shards")


def test_a_log_gets_a_plain_line_every_so_often(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))
    with ProgressBar(total=10, unit="tokens", desc="scoring", mininterval=0) as bar:
        for step in range(10):
            clock[0] += 10.0  # the lines are due at 30, 60 and 90 seconds
            bar.update()
            bar.set_postfix_str(f"{step} shards")
            if step == 3:
                bar.write("lost a worker", file=sys.stderr)
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(" in ")[0] for line in lines] == [
        "scoring: 30%, 3 of 10 tokens",
        "lost a worker",
        "scoring: 60%, 6 of 10 tokens",
        "scoring: 90%, 9 of 10 tokens",
        "",
    ]
    assert re.search(r" in \d\d:\d\d, [\d.,]+ per second, \d\d:\d\d left, [01] shards$", lines[0])
    assert not any("\r" in line for line in lines)


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture) -> None:
    count()
    assert list(ProgressBar(range(3), unit="rows", desc="weights")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    count()
    assert "scoring: 100%|" in terminal.getvalue()
    assert terminal.getvalue().count("\r") > 5


def test_a_hidden_bar_shows_nothing_even_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with hidden_bar(total=3, unit="tokens", desc="scoring", mininterval=0, disable=False) as bar:
        bar.update(3)
        bar.set_postfix_str("3 shards")
    assert terminal.getvalue() == ""
