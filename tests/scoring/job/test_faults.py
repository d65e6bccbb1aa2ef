"""Faults by hand: impossible scores, exceptions, and which sequences are left out."""

import numpy as np
import pytest
import torch

from weighted_mtp.scoring.job.faults import (
    BrokenEngineError,
    OutOfMemoryError,
    fault_in,
    is_out_of_memory,
    measure_each,
    reason_for,
)


def test_a_token_after_a_prompt_must_have_a_score():
    nan = np.nan
    assert fault_in(np.array([[nan, 1, 2], [3, 1, 2]], np.float32), [1, 0]) is None
    assert fault_in(np.array([[nan, 1, 2], [nan, 1, 2]], np.float32), [1, 0]) == "token 0 has the score nan"
    assert fault_in(np.array([[nan]], np.float32), [1]) is None


@pytest.mark.parametrize(
    ("score", "fault"),
    [
        (-0.01, None),
        (-0.02, "token 1 has the score -0.0"),
        (65504, None),
        (65536, "token 1 has the score 65536.0"),
        (np.inf, "token 1 has the score inf"),
    ],
)
def test_scores_lie_between_zero_and_the_largest_float16(score: float, fault: str | None) -> None:
    found = fault_in(np.array([[np.nan, score, 1]], np.float32), [1])
    assert found is None if fault is None else found.startswith(fault)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: Out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_memory_errors_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_reason_is_one_short_line() -> None:
    assert reason_for(ValueError("bad token\nin line 2")) == "ValueError: bad token"
    assert reason_for(KeyError()) == "KeyError: KeyError"
    assert len(reason_for(ValueError("word " * 1000))) <= 400


class Measure:
    """Scores of a row are its number; raises `errors[row]` if the row is among those asked for."""

    def __init__(self, errors: dict[int, Exception] | None = None, impossible: tuple[int, ...] = ()) -> None:
        self.errors = errors or {}
        self.impossible = list(impossible)
        """Rows whose next score is NaN, once for each mention."""
        self.asked: list[list[int]] = []

    def __call__(self, rows: list[int]) -> list[np.ndarray]:
        self.asked.append(rows)
        for row in rows:
            if row in self.errors:
                raise self.errors[row]
        return [np.full((1, 2), self.score(row), np.float32) for row in rows]

    def score(self, row: int) -> float:
        if row in self.impossible:
            self.impossible.remove(row)
            return np.nan
        return row


def works() -> None:
    """The check of an engine that still works."""


def measured(measure: Measure, rows: list[int], check_engine=works) -> tuple[dict[int, float], dict[int, str]]:
    found, reasons = measure_each(measure, rows, lambda row, scores: fault_in(scores, [0]), check_engine)
    assert all((scores == scores[0, 0]).all() for scores in found.values())
    return {row: float(scores[0, 0]) for row, scores in found.items()}, reasons


def test_sound_rows_are_measured_in_one_call() -> None:
    measure = Measure()
    assert measured(measure, [3, 1, 2]) == ({3: 3, 1: 1, 2: 2}, {})
    assert measure.asked == [[3, 1, 2]]


def test_rows_that_raise_are_found_by_halving() -> None:
    measure = Measure({2: ValueError("bad"), 5: KeyError("worse")})
    found, reasons = measured(measure, [0, 1, 2, 3, 4, 5, 6])
    assert found == {row: row for row in (0, 1, 3, 4, 6)}
    assert reasons == {2: "ValueError: bad", 5: "KeyError: 'worse'"}
    assert measure.asked[:3] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [0]]


def test_impossible_scores_are_measured_once_more_alone() -> None:
    measure = Measure(impossible=(1, 2, 2))
    found, reasons = measured(measure, [0, 1, 2])
    assert found == {0: 0, 1: 1}, "row 1 was wrong only once"
    assert reasons == {2: "token 0 has the score nan"}
    assert measure.asked == [[0, 1, 2], [1], [2]]


def test_memory_that_runs_out_is_not_the_fault_of_a_row() -> None:
    measure = Measure({1: RuntimeError("CUDA out of memory")})
    with pytest.raises(OutOfMemoryError, match="RuntimeError: CUDA out of memory"):
        measured(measure, [0, 1])
    assert measure.asked == [[0, 1]]


def test_an_engine_that_stopped_working_is_no_reason_to_give_up_a_row() -> None:
    def broken() -> None:
        raise RuntimeError("engine is dead")

    measure = Measure({1: ValueError("bad")})
    with pytest.raises(BrokenEngineError, match="ValueError: bad"):
        measured(measure, [0, 1], broken)
    assert measure.asked == [[0, 1]], "a dead engine is not asked again"
