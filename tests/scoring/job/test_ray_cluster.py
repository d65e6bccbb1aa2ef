"""Clusters of several Ray nodes on this machine: nodes that come, go, do not fit or do not answer."""

from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from weighted_mtp.pipelines.score import run as run_score
from weighted_mtp.schemas.configs import ScoreConfig
from weighted_mtp.schemas.errors import UserError
from weighted_mtp.schemas.shard_set.shard_set import ShardSet
from weighted_mtp.schemas.shard_set.verification import verify
from weighted_mtp.scoring.job.ray_cluster import cause_of_death, host_lost, ray_session

ROWS = 160


@pytest.fixture
def tokens(many_tokens: Callable[[int], ShardSet]) -> ShardSet:
    return many_tokens(ROWS // 4)


@pytest.mark.slow
def test_nodes_come_and_go(nodes, scoring, tokens: ShardSet):
    """A run starts with one node, uses a second one that is added, and ends with what is left when one dies."""
    first = nodes.add()
    run = scoring(tokens, "--ray_address", nodes.address, "--workers", 2, "--min_workers", 1)
    run.start()
    run.wait_until(lambda: run.done() > 3)
    assert len(run.workers()) == 1
    with run.held():
        nodes.add()
        run.wait_until(lambda: len(run.workers()) == 2)
        nodes.kill(first)
    assert run.wait() == 0, run.lines()
    scored = ShardSet.open(run.output)
    assert [check for check in verify(scored.path, scored.manifest) if check.fault] == []
    assert len({row for row, _ in run.scored()}) == ROWS
    assert len(run.scored()) <= ROWS + 2 * 4, "the dead worker had two shards"
    # Ray may place the next worker on the dead node before it knows; that one had no shards.
    lost = [line for line in run.lines() if "lost a worker" in line and "; scoring " in line]
    assert len(lost) == 1
    assert "raylet" not in run.printed.read_text(), "Ray has pages to say about a dead node"


def test_a_broken_connection_is_no_failure_of_the_worker():
    error = ActorUnavailableError("The actor is temporarily unavailable: RpcError: ...", None)
    assert host_lost(error)
    assert cause_of_death(error) == "the connection to it broke"
    assert not host_lost(ActorDiedError())


@pytest.mark.slow
def test_workers_that_cannot_be_placed(nodes, tokens, reference_model, tmp_path):
    """The nodes have two CPUs together."""
    nodes.add(), nodes.add()
    paths = {"input": tokens.path, "output": tmp_path / "scored", "reference": str(reference_model)}
    refused = {
        "--workers 1: each needs 2 CPUs on one node, .*can hold 0": {"cpus_per_worker": 2},
        "--workers 3: each needs 1 CPUs on one node, .*can hold 2": {"workers": 3},
        "--workers 3: .*lower --workers, .*--min_workers, or add nodes": {"workers": 4, "min_workers": 3},
        "--gpus_per_worker 0.5: no GPU usable by transformers here": {"gpus_per_worker": 0.5},
    }
    with ray_session(nodes.address):
        for message, settings in refused.items():
            config = ScoreConfig.model_validate(paths | {"engine": "transformers"} | settings)
            with pytest.raises(UserError, match=message):
                run_score(config)


@pytest.mark.slow
def test_last_node_dies(nodes, scoring, tokens):
    node = nodes.add()
    run = scoring(tokens, "--ray_address", nodes.address, constants={"PLACEMENT_SECONDS": 3.0})
    run.start()
    run.wait_until(lambda: run.done() > 3)
    nodes.kill(node)
    assert run.wait() == 1
    error = run.lines()[-1]
    assert error.startswith("wmtp score: error: no node of the Ray cluster (0 CPUs, 0 GPUs) can hold a worker any more")
    nodes.add()
    run.start()
    assert run.wait() == 0, run.lines()
    assert len(run.scored()) <= ROWS + 2 * 4


@pytest.mark.slow
def test_two_runs_with_one_output(nodes, scoring, tokens):
    nodes.add(), nodes.add()
    runs = [scoring(tokens, "--ray_address", nodes.address, "--workers", 1) for _ in range(2)]
    runs[0].start()
    runs[0].wait_until(lambda: runs[0].done() > 3)
    with runs[0].held():
        runs[1].start()
        assert runs[1].wait() == 1
    assert len(runs[1].lines()) == 1
    assert runs[1].lines()[0].endswith("another process is writing to it; wait or choose another")
    assert runs[0].wait() == 0, runs[0].lines()
    assert len(runs[0].scored()) == ROWS
    scored = ShardSet.open(runs[0].output)
    assert [check for check in verify(scored.path, scored.manifest) if check.fault] == []


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_TOKEN": "f" * 64}, pytest.param({"RAY_AUTH_MODE": "disabled"}, marks=pytest.mark.slow)],
)
def test_without_the_token(cluster, scoring, tokens, environment):
    run = scoring(tokens, "--ray_address", cluster.address, environment=environment)
    run.start()
    assert run.wait() == 1
    assert len(run.lines()) == 1
    assert f"--ray_address {cluster.address}: cannot connect to Ray" in run.lines()[0]
    assert "Authentication token is missing or incorrect" in run.lines()[0]


@pytest.mark.slow
def test_head_dies(cluster, scoring, tokens):
    """Comes last: it is the end of the cluster."""
    cluster.add()
    run = scoring(tokens, "--ray_address", cluster.address, seconds=1, constants={"HEAD_SECONDS": 3.0})
    run.start()
    run.wait_until(lambda: run.done() > 1)
    cluster.kill_gcs()
    assert run.wait(60) == 1
    assert run.lines()[-1].startswith("wmtp score: error: the head of the Ray cluster no longer answers")
