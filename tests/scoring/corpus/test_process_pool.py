"""The functions that run in other processes are from the standard library, which every process can import."""

import os
from collections.abc import Iterator

import pytest

from weighted_mtp.schemas.errors import UserError
from weighted_mtp.scoring.corpus.process_pool import map_in_order

SLOW_FIRST = [range(5_000_000), *(range(item) for item in range(20))]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order(workers: int) -> None:
    expected = [sum(item) for item in SLOW_FIRST]
    assert list(map_in_order(sum, SLOW_FIRST, workers, "scoring")) == expected


@pytest.mark.parametrize(("workers", "bound"), [(1, 1), (2, 5)])
def test_few_items_are_under_way(workers: int, bound: int) -> None:
    read = 0

    def items() -> Iterator[range]:
        nonlocal read
        for item in SLOW_FIRST:
            read += 1
            yield item

    for done, _ in enumerate(map_in_order(sum, items(), workers, "scoring")):
        assert read - done <= bound


def test_dead_process_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--workers"):
        list(map_in_order(os._exit, range(20), 2, "scoring"))


def test_processes_have_no_stderr() -> None:
    assert list(map_in_order(os.readlink, ["/proc/self/fd/2"], 2, "scoring")) == [os.devnull]
