"""`kill -9` of a process while it computes, ten times with each engine: the scored set is the same in every byte."""

import re
from collections.abc import Callable

import psutil
import pytest

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA, PROGRESS

pytestmark = pytest.mark.slow
WORKER = "ray::ScoringWor"


def kill_computing(run, victim: str) -> None:
    """Kill a worker, or one of the processes of its engine, in the middle of a shard; wait until all of it has gone."""
    with run.computing() as pid:
        worker = psutil.Process(pid)
        tree: dict[psutil.Process, str] = {}

        def found() -> bool:
            tree.clear()
            tree.update({process: process.name() for process in (worker, *worker.children(recursive=True))})
            return any(name.startswith(victim) for name in tree.values())

        run.wait_until(found)
        (process,) = (process for process, name in tree.items() if name.startswith(victim))
        process.kill()
        gone, left = psutil.wait_procs(list(tree), timeout=60)
        assert not left
        assert process in gone


def lost_shards(run) -> list[list[str]]:
    """The names of the shards that each lost worker had."""
    lines = re.findall("lost a worker .*; scoring (.*) again", run.printed.read_text())
    return [line.split(", ") for line in lines]


@pytest.mark.parametrize(
    ("flags", "victims"),
    [
        (["--engine", "transformers"], [WORKER] * 10),
        (["--engine", "vllm"], [WORKER] * 6),
        (
            ["--engine", "vllm", "--tensor_parallel_size", 2],
            [WORKER, "VLLM::Worker_TP0", "VLLM::Worker_TP1", WORKER],
        ),
    ],
    ids=["transformers", "vllm", "vllm-parallel"],
)
def test_kills_in_mid_shard_change_no_byte(flags, victims, request, scoring, many_tokens: Callable[[int], ShardSet]):
    if "vllm" in flags:
        request.getfixturevalue("vllm_installed")
    tokens = many_tokens(3 * len(victims))
    whole = scoring(tokens, *flags, output="whole", seconds=0)
    whole.start()
    assert whole.wait() == 0, whole.lines()

    run = scoring(tokens, *flags, seconds=0.1)
    run.start()
    for number, victim in enumerate(victims, 1):
        kill_computing(run, victim)
        run.wait_until(lambda number=number: len(lost_shards(run)) == number)
        # A shard that is lost twice would be scored in another way.
        again = [run.output / PROGRESS / shard for shard in lost_shards(run)[-1]]
        run.wait_until(lambda again=again: all(record.exists() for record in again))
    assert run.wait() == 0, run.lines()

    assert ShardSet.open(run.output).manifest.digest == ShardSet.open(whole.output).manifest.digest
    assert {file.name for file in run.output.iterdir()} == {file.name for file in whole.output.iterdir()}
    for file in (whole.output / DATA).glob("*.parquet"):
        assert (run.output / DATA / file.name).read_bytes() == file.read_bytes()
    assert len(lost_shards(run)) == len(victims)
    printed = run.printed.read_text()
    incidents = printed.count("wmtp score: ")  # also waits for a worker on a busy machine
    assert f"incidents: {incidents}, see above" in " ".join(printed.split())
    assert "rejects" not in printed
