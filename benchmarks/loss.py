"""Time and memory of the weighted cross-entropy against those of PyTorch, Liger and cut-cross-entropy.

    .venv/bin/python benchmarks/loss.py [--dtype bfloat16] [--threads 2]
    .venv/bin/python benchmarks/loss.py --device cuda --dtype bfloat16 --rows 16384 --hidden 896 --vocabulary 151936

The second command is for a GPU. There Liger and cut-cross-entropy run too, where they are installed.

Every contestant computes the sum of weighted losses and its gradients for hidden states and unembedding. All but ours
take no weights before the backward pass, so they compute all rows whether they carry weight or not. They take turns,
and one that runs first in a round was last in the one before.

On a CPU time is that of one thread's own work (`--threads` above 1: of the clock), and memory is what PyTorch's
allocator held at most, by its profiler. In bfloat16 matrix products may take minutes there, so fewer rows are the
default; what a row costs hardly depends on how many there are.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.model.heads import ResidualHeads, TrunkOutput
from weighted_mtp.training.model.trunk import LayerCall

CONSOLE = Console(width=120)
CHUNK = 512


class Problem(NamedTuple):
    """Hidden states (R, D) and an unembedding (V, D) that need gradients, targets (R,) int64 and weights (R,)."""

    hidden: Tensor
    unembedding: Tensor
    targets: Tensor
    weights: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="default 4096, with bfloat16 on a CPU 128")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--share", type=float, default=0.6, help="share of the rows that carry weight")
    parser.add_argument("--rounds", type=int, help="default 3, with bfloat16 on a CPU 1")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on a CPU")
    arguments = parser.parse_args()
    slow = arguments.dtype == "bfloat16" and arguments.device == "cpu"
    rows = arguments.rows or (128 if slow else 4096)
    torch.set_num_threads(arguments.threads)
    problem = make_problem(
        rows, arguments.hidden, arguments.vocabulary, getattr(torch, arguments.dtype), arguments.device
    )
    few = problem._replace(weights=problem.weights * (torch.rand_like(problem.weights) < arguments.share))
    place = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} thread(s)"
    shape = f"{rows} x {arguments.hidden} x {arguments.vocabulary}, {arguments.dtype}, {place}"
    runs = contestants(problem, few, arguments.share)
    seconds = measure(runs, arguments.rounds or (1 if slow else 3), clock(arguments.device, arguments.threads))
    report_time(seconds, shape)
    if not slow:  # there the operation computes in float32
        report_memory(problem, shape)


def make_problem(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Problem:
    """Random numbers; every row has a weight."""
    torch.manual_seed(0)
    return Problem(
        torch.randn(rows, hidden).to(device, dtype).requires_grad_(),
        (0.02 * torch.randn(vocabulary, hidden)).to(device, dtype).requires_grad_(),
        torch.randint(vocabulary, (rows,)).to(device),
        (0.1 + torch.rand(rows)).to(device),
    )


Contestant = tuple[Callable[[Problem], Tensor], Problem]
"""What computes the sum of weighted losses, and of what."""


def contestants(dense: Problem, few: Problem, share: float) -> dict[str, Contestant]:
    """What is compared, by name; the first is what ratios refer to."""
    # In bfloat16 on a CPU the other policies use products that are many times slower.
    policy = "accurate" if dense.hidden.device.type == "cpu" else "auto"
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None, acc_policy=policy)
    runs = {
        "F.linear_cross_entropy": (partial(torch_own, options=None), dense),
        "the same, automatic chunks": (partial(torch_own, options=nn.LinearCrossEntropyOptions()), dense),
        f"the same, chunks of {CHUNK}": (partial(torch_own, options=chunks), dense),
        "F.linear and F.cross_entropy": (naive, dense),
        "ours, every row has weight": (ours, dense),
        f"ours, {share:.0%} of the rows have weight": (ours, few),
    }
    if dense.hidden.device.type == "cuda":
        for package, name, run in (
            ("liger_kernel", "Liger, without weights", liger),
            ("cut_cross_entropy", "cut-cross-entropy", cut_cross_entropy),
        ):
            if find_spec(package):
                runs[name] = run, dense
            else:
                CONSOLE.print(f"{package}: not installed, left out")
    return runs


def naive(problem: Problem) -> Tensor:
    """All logits at once."""
    logits = F.linear(problem.hidden, problem.unembedding)
    return F.cross_entropy(logits, problem.targets, reduction="none").float() @ problem.weights


def torch_own(problem: Problem, options: nn.LinearCrossEntropyOptions | None) -> Tensor:
    """PyTorch's own, which without options computes all logits at once, too."""
    losses = F.linear_cross_entropy(
        problem.hidden, problem.unembedding, problem.targets, reduction="none", options=options
    )
    return losses.float() @ problem.weights


def ours(problem: Problem) -> Tensor:
    """Rows that carry weight, as `training.loss.shifted_targets.select_targets` finds them."""
    [rows] = problem.weights.nonzero(as_tuple=True)
    return weighted_linear_cross_entropy(
        problem.hidden[rows], problem.unembedding, problem.targets[rows], problem.weights[rows]
    )[0]


def liger(problem: Problem) -> Tensor:
    """Liger builds gradients in the forward pass and takes no weights of tokens: their plain sum."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(problem.hidden, problem.unembedding, problem.targets, reduction="sum")


def cut_cross_entropy(problem: Problem) -> Tensor:
    """Apple's kernels, exact: without the filter that drops small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        problem.hidden, problem.unembedding, problem.targets, reduction="none", filter_eps=None
    )
    return losses.float() @ problem.weights


def clock(device: str, threads: int) -> Callable[[], float]:
    """Seconds: of the device's work, of this process's own work on one core, or of the wall clock."""
    if device == "cuda":
        return synchronized_time
    return time.process_time if threads == 1 else time.perf_counter


def synchronized_time() -> float:
    """Seconds, once the GPU has done what it was told."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(runs: dict[str, Contestant], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of forward and backward pass of each contestant in each round; on a GPU after two more rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    warm_up = 2 if now is synchronized_time else 0
    names = list(runs)
    for number in range(warm_up + rounds):
        for name in names if number % 2 else names[::-1]:
            run, problem = runs[name]
            started = now()
            torch.autograd.grad(run(problem), (problem.hidden, problem.unembedding))
            if number >= warm_up:
                seconds[name].append(now() - started)
    return seconds


def heads_memory(problem: Problem, heads: int) -> int:
    """Bytes that the loss of residual heads on one trunk output needs beyond its arguments, gradients included."""
    trunk = SimpleNamespace(config=SimpleNamespace(hidden_size=problem.hidden.shape[1]))
    residual = ResidualHeads(trunk, range(1, heads + 1)).to(problem.hidden.device, problem.hidden.dtype)
    trunk_pass = TrunkOutput((problem.hidden[None],), torch.arange(len(problem.targets))[None], LayerCall())
    task = HeadTargets(
        torch.arange(len(problem.targets), device=problem.targets.device), problem.targets, problem.weights
    )
    groups = [HeadGroup([0], lambda inputs, rows: [inputs[0].flatten(0, 1)[rows[0]]]), *residual.groups(trunk_pass)]
    ones = torch.ones(heads, device=problem.targets.device)

    def run() -> None:
        multi_head_cross_entropy(trunk_pass.inputs, groups, [task] * heads, problem.unembedding, ones).total.backward()

    peak = peak_on_gpu(run) if problem.hidden.is_cuda else peak_on_cpu(run)
    problem.hidden.grad = problem.unembedding.grad = None
    return peak


def peak_on_gpu(run: Callable[[], None]) -> int:
    """Bytes that PyTorch's allocator held at most beyond those from before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(run: Callable[[], None]) -> int:
    """The same, summed up from the allocations and releases in the profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))


def report_memory(problem: Problem, shape: str) -> None:
    """Print what one and four heads need, and their ratio, also with trunk output and unembedding counted."""
    arguments = problem.hidden.nbytes + problem.unembedding.nbytes
    one, four = (heads_memory(problem, heads) for heads in (1, 4))
    result = Table("heads", "peak memory of loss and gradients", "of one head", "with arguments", title=shape)
    for heads, peak in ((1, one), (4, four)):
        share, total = peak / one, (peak + arguments) / (one + arguments)
        result.add_row(str(heads), f"{peak / 2**20:.0f} MiB", f"{share:.3f}", f"{total:.3f}")
    CONSOLE.print(result)


def report_time(seconds: dict[str, list[float]], shape: str) -> None:
    """Print fastest and median time of each, and how they compare with the first."""
    result = Table("forward and backward pass", title=shape)
    for column in ("fastest, s", "median, s", "of the first", "of the first, median"):
        result.add_column(column, justify="right")
    first, *_ = seconds.values()
    for name, values in seconds.items():
        fastest, median = min(values), statistics.median(values)
        result.add_row(
            name,
            f"{fastest:.3f}",
            f"{median:.3f}",
            f"{fastest / min(first):.2f}",
            f"{median / statistics.median(first):.2f}",
        )
    CONSOLE.print(result)


if __name__ == "__main__":
    main()
