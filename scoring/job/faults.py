"""Faults of engines, contained: one bad sequence costs its own scores, not its shard's.

Sequences whose scoring raises are found by halving, those with numbers that no loss can be are seen in the result; each
is tried once more alone before it is given up. What is no fault of a sequence is told apart: memory that ran out, and
engines that do not work at all any more.
"""

from collections.abc import Callable
from textwrap import shorten

import numpy as np
import torch

from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.shard_set.value_counts import FLOAT16_MAX

ROUNDING = 0.01
"""Losses and entropies are not negative, but computed ones may be, by a little."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class OutOfMemoryError(Exception):
    """An engine ran out of memory; with a smaller batch it may not."""


class BrokenEngineError(Exception):
    """An engine that failed on a sequence and fails on everything since."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def reason_for(error: BaseException) -> str:
    """An exception in one line."""
    return shorten(f"{type(error).__name__}: {first_line(error)}", 400)


def fault_in(scores: np.ndarray, first_scored: list[int]) -> str | None:
    """What is wrong with the scores of a sequence, float32 [measurements, tokens], from the first scored ones on."""
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
    """Measure sequences, leaving out those that cannot be.

    Args:
        measure: returns the scores of the sequences with the given numbers, each float32 [measurements, tokens].
        rows: numbers of the sequences.
        find_fault: says what is wrong with the scores of the sequence with the given number.
        check_engine: raises if the engine does not work any more.

    Returns:
        The scores of the sequences that have some, and why the others have none.

    Raises:
        OutOfMemoryError: memory ran out.
        BrokenEngineError: after a sequence that failed alone, everything fails.
    """
    try:
        found = dict(zip(rows, measure(rows), strict=True))
    except Exception as error:  # whatever the engine has to say
        if is_out_of_memory(error):
            raise OutOfMemoryError(reason_for(error)) from error
        if len(rows) == 1:
            try:
                check_engine()
            except Exception as broken:
                raise BrokenEngineError(reason_for(error)) from broken
            return {}, {rows[0]: reason_for(error)}
        half = len(rows) // 2
        parts = [measure_each(measure, some, find_fault, check_engine) for some in (rows[:half], rows[half:])]
        return parts[0][0] | parts[1][0], parts[0][1] | parts[1][1]
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
