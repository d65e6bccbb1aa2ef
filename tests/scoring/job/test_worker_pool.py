from weighted_mtp.scoring.job.worker_pool import WorkerPool


def plan(workers: int, gpus: int, tensor_parallel_size: int = 1, share: float | None = None) -> tuple[int, float]:
    pool = WorkerPool.plan(
        workers, min_workers=None, cpus=1, gpus_per_worker=share, gpus=gpus, tensor_parallel_size=tensor_parallel_size
    )
    assert pool.min_workers == pool.max_workers
    return pool.max_workers, pool.gpus


def test_workers_share_the_gpus_evenly():
    assert plan(0, 0) == (1, 0.0)
    assert plan(3, 0) == (3, 0.0)
    assert plan(0, 8) == (8, 1.0)
    assert plan(3, 2) == (3, 0.5)
    assert plan(4, 8) == (4, 1.0)
    assert plan(0, 8, 2) == (4, 2.0)
    assert plan(1, 8, 2) == (1, 2.0)
    assert plan(0, 1, 2) == (1, 2.0), "a cluster of one GPU cannot place it"
    assert plan(0, 8, share=0.25) == (32, 0.25)
    assert plan(3, 8, share=0.25) == (3, 0.25)


def test_places_are_counted_node_by_node():
    """A share of a GPU lies on one GPU, and the GPUs of one engine on one node."""
    node = {"CPU": 16.0, "GPU": 3.0}
    assert WorkerPool(1, 1, 1, 1).places_on(node) == 3
    assert WorkerPool(1, 1, 1, 2).places_on(node) == 1
    assert WorkerPool(1, 1, 1, 1 / 3).places_on(node) == 9
    assert WorkerPool(1, 1, 1, 0.4).places_on(node) == 6
    assert WorkerPool(1, 1, 4, 0.4).places_on(node) == 4
    assert WorkerPool(1, 1, 0.5, 0).places_on({"CPU": 2.0}) == 4
    assert WorkerPool(1, 1, 1, 1).places_on({"CPU": 2.0}) == 0
