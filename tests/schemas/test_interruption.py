"""SIGINT and SIGTERM: raised once, held back, or left alone."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from weighted_mtp.schemas.interruption import SIGNALS, Interruption


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_only_the_first_signal_raises(number: signal.Signals) -> None:
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert interruption.number == number


def start(signals: list[int], done: list[str], error: Exception | None = None) -> None:
    """Something that a signal must not stop halfway."""
    with Interruption(deferred=True):
        for number in signals:
            signal.raise_signal(number)
        done.append("the rest")
        if error:
            raise error


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_arrives_at_the_end_of_the_block(number: signal.Signals) -> None:
    done: list[str] = []
    with Interruption() as outer:
        start([], done)
        with pytest.raises(KeyboardInterrupt):
            start([number], done)
    assert done == ["the rest", "the rest"]
    assert outer.number == number


def test_a_deferred_signal_replaces_an_error_that_it_may_have_caused() -> None:
    with Interruption(), pytest.raises(KeyboardInterrupt):
        start([signal.SIGINT], [], RuntimeError())


def test_a_later_signal_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that hangs can be interrupted, also in a notebook."""
    monkeypatch.setattr("weighted_mtp.schemas.interruption.PATIENCE_SECONDS", -1.0)
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        start([signal.SIGINT, signal.SIGINT], done)
    assert done == []


def test_a_background_job_goes_on_ignoring_ctrl_c() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
        assert interruption.number == 0
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_need_no_handlers() -> None:
    entered = []

    def enter() -> None:
        with Interruption():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


def test_a_later_signal_ends_a_process_that_still_cleans_up() -> None:
    script = (
        "import signal, time; from weighted_mtp.schemas import interruption\n"
        "interruption.PATIENCE_SECONDS = 0.0\n"
        "signal.signal(signal.SIGTERM, interruption.end_process)\n"
        "with interruption.Interruption():\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        time.sleep(0.01)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        time.sleep(60)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert (run.returncode, run.stderr) == (143, "wmtp: interrupted\n")
