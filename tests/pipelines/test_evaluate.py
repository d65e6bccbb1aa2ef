"""`wmtp evaluate` in one process and in several."""

from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from comparing import free_port

from weighted_mtp.pipelines import evaluate
from weighted_mtp.schemas.configs import EvaluateConfig
from weighted_mtp.schemas.shard_set.shard_set import ShardSet

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RANK = """
import contextlib
import torch
from weighted_mtp.pipelines import evaluate
from weighted_mtp.schemas.configs import EvaluateConfig
torch.set_num_threads(1)
with open(output, "w") as file, contextlib.redirect_stdout(file):
    evaluate.run(EvaluateConfig.model_validate_json(config))
"""


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_processes_print_the_table_of_one_once(
    start_process: Callable[..., BaseProcess],
    make_model: Callable[..., Path],
    make_shard_set: Callable[..., ShardSet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five rows in batches of two: the second round has one batch. The last of six documents is cut to 49 tokens."""
    rng = np.random.default_rng(0)
    shards = make_shard_set([rng.integers(0, 256, length).tolist() for length in (60, 64, 40, 50, 7, 64)])
    config = EvaluateConfig(model=str(make_model()), input=shards.path, max_tokens=270, batch_size=2)
    evaluate.run(config)
    expected = capsys.readouterr().out
    assert " 264 " in expected
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outputs = [tmp_path / f"output-{rank}" for rank in range(2)]
    ranks = [
        start_process(
            RANK,
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            config=config.model_dump_json(),
            output=str(outputs[rank]),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert [output.read_text() for output in outputs] == [expected, ""]
