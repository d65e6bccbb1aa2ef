"""Containment of engine faults: a bad sequence loses its own scores, not those of its shard.

Bisection finds sequences that make the engine raise; impossible losses show in the results. Each such sequence is tried
once more alone before it is given up. Lack of memory and engines that stopped working raise exceptions.
"""

from collections.abc import Callable
from textwrap import shorten

import numpy as np
import torch

from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.shard_set.rounding import FLOAT16_MAX

ROUNDING = 0.01
"""Tolerance for losses and entropies made slightly negative by rounding errors."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class OutOfMemoryError(Exception):
    """An engine ran out of memory; a smaller batch may help."""


class BrokenEngineError(Exception):
    """An engine failed on a sequence and has failed on everything since."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the GPU or the machine ran out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def reason_for(error: BaseException) -> str:
    """An exception in one line."""
    return shorten(f"{type(error).__name__}: {first_line(error)}", 400)


def fault_in(scores: np.ndarray, first_scored: list[int]) -> str | None:
    """Describe the first impossible score of a sequence, None if there is none.

    Args:
        scores: float32 [measurements, tokens].
        first_scored: first token with a score, for each measurement.
    """
    expected = np.arange(scores.shape[1]) >= np.asarray(first_scored)[:, None]
    bad = expected & ~((scores >= -ROUNDING) & (scores <= FLOAT16_MAX))
    if not bad.any():
        return None
    line, token = np.argwhere(bad)[0]
    return f"token {token} has the score {scores[line, token]}"


def measure_each(
    measure: Callable[[list[int]], list[np.ndarray]],
    rows: list[int],
    find_fault: Callable[[int, np.ndarray], str | None],
    check_engine: Callable[[], object],
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Measure sequences, leaving out those that cannot be scored.

    Args:
        measure: returns the scores of the given rows, each float32 [measurements, tokens].
        rows: rows of the sequences.
        find_fault: describes the fault in the scores of a row, or returns None.
        check_engine: raises if the engine has stopped working.

    Returns:
        Scores by row, and reasons by row for the rows without scores.

    Raises:
        OutOfMemoryError: memory ran out.
        BrokenEngineError: sequences failed, and the engine has not worked since.
    """
    try:
        found = dict(zip(rows, measure(rows), strict=True))
    except Exception as error:  # engines raise exceptions of any type
        if is_out_of_memory(error):
            raise OutOfMemoryError(reason_for(error)) from error
        try:
            check_engine()
        except Exception as broken:
            raise BrokenEngineError(reason_for(error)) from broken
        if len(rows) == 1:
            return {}, {rows[0]: reason_for(error)}
        half = len(rows) // 2
        first, first_reasons = measure_each(measure, rows[:half], find_fault, check_engine)
        second, second_reasons = measure_each(measure, rows[half:], find_fault, check_engine)
        return first | second, first_reasons | second_reasons
    faults = {row: fault for row, scores in found.items() if (fault := find_fault(row, scores))}
    for row in faults:
        del found[row]
    if len(rows) == 1:
        return found, faults
    given_up: dict[int, str] = {}
    for row in faults:
        again, reasons = measure_each(measure, [row], find_fault, check_engine)
        found |= again
        given_up |= reasons
    return found, given_up
