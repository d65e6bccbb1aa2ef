"""Twenty times `kill -9`, of workers, whole nodes and the driver: the scored set is the same in every byte."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest

from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.storage.files import DATA

SHARDS = 160
ROWS = 4
KILLS = {"worker": 9, "node": 7, "driver": 4}
UNITS_LOST = {"worker": 2, "node": 2, "driver": 4}
"""A worker has two units under way, and a driver two workers."""


@pytest.mark.soak
def test_twenty_kills_change_no_byte(nodes, scoring, many_tokens: Callable[[int], ShardSet]):
    rng = random.Random(0)
    tokens = many_tokens(SHARDS)
    alive = [nodes.add(), nodes.add()]
    settings = ("--ray_address", nodes.address, "--workers", 2, "--min_workers", 1)
    whole = scoring(tokens, *settings, output="whole", seconds=0)
    whole.start()
    assert whole.wait() == 0, whole.lines()

    run = scoring(tokens, *settings, seconds=0.3)
    run.start()
    for kind in rng.sample(list(KILLS), counts=list(KILLS.values()), k=sum(KILLS.values())):
        done = run.done()
        run.wait_until(lambda done=done: run.done() > done and run.workers())
        time.sleep(rng.uniform(0, 1))
        if kind == "worker":
            os.kill(rng.choice(sorted(run.workers())), signal.SIGKILL)
        elif kind == "node":
            nodes.kill(alive.pop(rng.randrange(2)))
            alive.append(nodes.add())
        else:
            run.kill()
            run.start()
    assert run.wait() == 0, run.lines()

    same, expected = ShardSet.open(run.output), ShardSet.open(whole.output)
    assert same.manifest.digest == expected.manifest.digest
    assert {file.name for file in run.output.iterdir()} == {file.name for file in whole.output.iterdir()}
    for file in (whole.output / DATA).glob("*.parquet"):
        assert (run.output / DATA / file.name).read_bytes() == file.read_bytes()
    times = Counter(row for row, _ in run.scored())
    assert len(times) == SHARDS * ROWS
    assert max(times.values()) <= 1 + sum(KILLS.values())
    assert times.total() <= ROWS * (SHARDS + sum(UNITS_LOST[kind] * kills for kind, kills in KILLS.items()))
