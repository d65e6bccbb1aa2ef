"""The number of workers of a job and the resources of each. Plain arithmetic, no Ray."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WorkerPool:
    """Limits on the number of workers, and the CPUs and GPUs of each.

    Attributes:
        max_workers: maximum number of workers.
        min_workers: workers that must fit on the cluster for the job to start.
        cpus: CPUs per worker.
        gpus: GPUs per worker: a share of one GPU, or several whole ones on one node.
    """

    max_workers: int
    min_workers: int
    cpus: float
    gpus: float

    @classmethod
    def plan(
        cls,
        workers: int,
        *,
        min_workers: int | None,
        cpus: float,
        gpus_per_worker: float | None,
        gpus: int,
        tensor_parallel_size: int,
    ) -> "WorkerPool":
        """Spread workers evenly over `gpus` GPUs.

        Args:
            workers: maximum number of workers; 0 for as many as fit on the GPUs, or one on a CPU.
            min_workers: workers that must fit at the start; None for all of them.
            cpus: CPUs per worker.
            gpus_per_worker: GPUs per worker; None for one, `tensor_parallel_size`, or a share if workers outnumber
                the GPUs.
            gpus: GPUs available; 0 if the engine uses none.
            tensor_parallel_size: GPUs that share one model.
        """
        if not gpus:
            share = 0.0
            count = workers or 1
        elif gpus_per_worker or tensor_parallel_size > 1:
            share = gpus_per_worker or float(tensor_parallel_size)
            count = workers or max(1, math.floor(gpus / share))
        else:
            count = workers or gpus
            share = 1 / -(-count // gpus)
        return cls(count, count if min_workers is None else min(min_workers, count), cpus, share)

    def for_units(self, units: int) -> "WorkerPool":
        """The pool for `units` units of work, with no more workers than units."""
        return replace(self, max_workers=min(self.max_workers, units), min_workers=min(self.min_workers, units))

    def needs(self) -> str:
        """Resources of one worker, in words."""
        return f"{self.cpus:g} CPUs" + f" and {self.gpus:g} GPUs" * bool(self.gpus)

    def places_on(self, resources: dict[str, float]) -> int:
        """Number of workers that an idle node with these Ray resources can hold. A share must lie on one GPU."""
        by_cpu = math.floor(resources.get("CPU", 0) / self.cpus + 1e-9)
        if not self.gpus:
            return by_cpu
        gpus = resources.get("GPU", 0)
        by_gpu = int(gpus) * math.floor(1 / self.gpus + 1e-9) if self.gpus < 1 else math.floor(gpus / self.gpus)
        return min(by_cpu, by_gpu)
