"""The benchmarks that `make gpu` does not run, in small: each ends and prints its tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

COMMANDS = {
    "checks": (
        "checks.py --tokens 4096 --steps 2 --rounds 2 --engines transformers",
        ["scoring, transformers", "training"],
    ),
    "driver": ("scaling.py --parts driver --units 4", ["open the source", "loader for training"]),
    "overhead": ("scaling.py --parts overhead --shards 2 --shard_tokens 4096", ["run, from the first worker ready"]),
    "memory": ("scaling.py --parts memory --held_tokens 4096", ["1 units", "8 units"]),
    "idle": ("scaling.py --parts idle --small_shards 2 --small_tokens 4096", ["first call to the end of the last"]),
    "storage": ("storage.py --tokens 20000", []),
    "weights": ("weights.py --rounds 1", ["rho1-static", "dense, random"]),
}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_table(name: str) -> None:
    command, rows = COMMANDS[name]
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row for row in rows if row not in done.stdout] == []
    assert "┃" in done.stdout
