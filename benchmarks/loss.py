"""Time and memory of the weighted cross-entropy, compared with PyTorch, Liger and cut-cross-entropy.

    .venv/bin/python benchmarks/loss.py [--dtype bfloat16] [--threads 2]
    .venv/bin/python benchmarks/loss.py --model smollm2-135m [--threads 2]
    .venv/bin/python benchmarks/loss.py --device cuda --dtype bfloat16 --rows 16384 --hidden 896 --vocabulary 151936

The second command has the hidden size and vocabulary of SmolLM2-135M, and where its package is installed (see
`support.smollm2`) its unembedding and its hidden states of Python's documentation. Other inputs are random. The last
command is for a GPU. It also runs Liger and cut-cross-entropy if they are installed.

Each implementation computes the sum of weighted losses and its gradients for hidden states and unembedding. All except
ours receive the weights only in the backward pass, so they also compute rows of weight 0. They take turns, in an order
that is reversed in each round.

On a CPU, time is CPU time of one thread (with `--threads` above 1, wall-clock time), and memory is the peak of
PyTorch's allocator, from its profiler. There bfloat16 matrix products may take minutes, so the default is fewer rows;
the cost per row hardly depends on their number. On a GPU, ours also runs once without its fused kernel.
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
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from support import smollm2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig

from weighted_mtp.training.loss.multi_head import (
    HeadGroup,
    HeadTargets,
    multi_head_cross_entropy,
    weighted_linear_cross_entropy,
)
from weighted_mtp.training.loss.objectives import CrossEntropy, Objective
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
    parser.add_argument("--rows", type=int, help="default 4096; 128 for bfloat16 on a CPU")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--model", choices=["smollm2-135m"], help="instead of --hidden and --vocabulary")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--share", type=float, default=0.6, help="share of rows with nonzero weight")
    parser.add_argument("--rounds", type=int, help="default 3; 1 for bfloat16 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads on a CPU")
    parser.add_argument("--json", type=Path, help="output file for the settings and rows")
    arguments = parser.parse_args()
    slow = arguments.dtype == "bfloat16" and arguments.device == "cpu"
    rows = arguments.rows or (128 if slow else 4096)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.model and smollm2.package():
        problem, inputs = real_problem(rows, dtype, arguments.device), "real inputs"
    else:
        sizes = (arguments.hidden, arguments.vocabulary)
        if arguments.model:
            sizes = smollm2.SHAPE["hidden_size"], smollm2.SHAPE["vocab_size"]
        problem, inputs = make_problem(rows, *sizes, dtype, arguments.device), "random inputs"
    few = problem._replace(weights=problem.weights * (torch.rand_like(problem.weights) < arguments.share))
    place = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} thread(s)"
    vocabulary, hidden = problem.unembedding.shape
    shape = f"{rows} x {hidden} x {vocabulary}, {inputs}, {arguments.dtype}, {place}"
    runs = implementations(problem, few, arguments.share)
    seconds = measure(runs, arguments.rounds or (1 if slow else 3), clock(arguments.device, arguments.threads))
    report_time(seconds, shape)
    results: list[dict[str, Any]] = [{"implementation": name, "seconds": values} for name, values in seconds.items()]
    if not slow:  # bfloat16 is computed in float32 on a CPU
        peaks = {heads: heads_memory(problem, heads) for heads in (1, 4)}
        report_memory(problem, peaks, shape)
        results += [{"implementation": f"{heads} heads", "peak_bytes": peak} for heads, peak in peaks.items()]
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": {"shape": shape}, "rows": results}, indent=2) + "\n")


def make_problem(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Problem:
    """Random numbers; all rows have nonzero weight."""
    torch.manual_seed(0)
    return Problem(
        torch.randn(rows, hidden).to(device, dtype).requires_grad_(),
        (0.02 * torch.randn(vocabulary, hidden)).to(device, dtype).requires_grad_(),
        torch.randint(vocabulary, (rows,)).to(device),
        (0.1 + torch.rand(rows)).to(device),
    )


def real_problem(rows: int, dtype: torch.dtype, device: str) -> Problem:
    """Hidden states of SmolLM2-135M that predict the next token of real text; all rows have nonzero weight."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = smollm2.write_checkpoint(Path(directory))
        model = AutoModelForCausalLM.from_pretrained(directory)
    states, targets, wanted = [], [], rows
    for ids in map(torch.from_numpy, smollm2.real_rows(tokenizer, smollm2.MOST_ROWS, 2048)):
        if wanted <= 0:
            break
        with torch.inference_mode():
            states.append(model.model(ids[None].long()).last_hidden_state[0, : min(wanted, len(ids) - 1)])
        targets.append(ids[1 : 1 + len(states[-1])].long())
        wanted -= len(states[-1])
    if wanted > 0:
        raise SystemExit(f"--rows {rows}: real text has {rows - wanted}")
    return Problem(
        torch.cat(states).clone().to(device, dtype).requires_grad_(),
        model.lm_head.weight.detach().to(device, dtype).requires_grad_(),
        torch.cat(targets).to(device),
        (0.1 + torch.rand(rows)).to(device),
    )


Implementation = tuple[Callable[[Problem], Tensor], Problem]
"""A function that computes the sum of weighted losses, and its input."""


def implementations(dense: Problem, few: Problem, share: float) -> dict[str, Implementation]:
    """The implementations to compare, by name; the first is the baseline of ratios."""
    runs: dict[str, Implementation] = {}
    if hasattr(F, "linear_cross_entropy"):
        # With bfloat16 on a CPU, the other policies use matrix products that are many times slower.
        policy = "accurate" if dense.hidden.device.type == "cpu" else "auto"
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None, acc_policy=policy)
        runs["F.linear_cross_entropy"] = partial(torch_own, options=None), dense
        runs["the same, automatic chunks"] = partial(torch_own, options=nn.LinearCrossEntropyOptions()), dense
        runs[f"the same, chunks of {CHUNK}"] = partial(torch_own, options=chunks), dense
    else:
        CONSOLE.print(f"F.linear_cross_entropy: PyTorch {torch.__version__} does not have it, skipped")
    runs |= {
        "F.linear and F.cross_entropy": (naive, dense),
        "ours, every row has weight": (ours, dense),
        f"ours, {share:.0%} of the rows have weight": (ours, few),
    }
    if dense.hidden.device.type == "cuda":
        runs["ours, every row, without the fused kernel"] = partial(ours, objective=PlainCrossEntropy()), dense
        for package, name, run in (
            ("liger_kernel", "Liger, without weights", liger),
            ("cut_cross_entropy", "cut-cross-entropy", cut_cross_entropy),
        ):
            if find_spec(package):
                runs[name] = run, dense
            else:
                CONSOLE.print(f"{package}: not installed, skipped")
    return runs


def naive(problem: Problem) -> Tensor:
    """Compute all logits at once."""
    logits = F.linear(problem.hidden, problem.unembedding)
    return F.cross_entropy(logits, problem.targets, reduction="none").float() @ problem.weights


def torch_own(problem: Problem, options: Any) -> Tensor:
    """PyTorch's function; without options it also computes all logits at once."""
    losses = F.linear_cross_entropy(
        problem.hidden, problem.unembedding, problem.targets, reduction="none", options=options
    )
    return losses.float() @ problem.weights


class PlainCrossEntropy(CrossEntropy):
    """Computed by PyTorch also on a GPU: the fused kernel is for `CrossEntropy` only."""


def ours(problem: Problem, objective: Objective | None = None) -> Tensor:
    """Only rows of nonzero weight, as selected by `training.loss.shifted_targets.select_targets`."""
    [rows] = problem.weights.nonzero(as_tuple=True)
    return weighted_linear_cross_entropy(
        problem.hidden[rows], problem.unembedding, problem.targets[rows], problem.weights[rows], objective=objective
    )[0]


def liger(problem: Problem) -> Tensor:
    """Unweighted sum: Liger computes gradients in the forward pass and does not support token weights."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(problem.hidden, problem.unembedding, problem.targets, reduction="sum")


def cut_cross_entropy(problem: Problem) -> Tensor:
    """Apple's kernels, without the filter for small gradients, which makes them exact."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        problem.hidden, problem.unembedding, problem.targets, reduction="none", filter_eps=None
    )
    return losses.float() @ problem.weights


def clock(device: str, threads: int) -> Callable[[], float]:
    """A clock in seconds: CPU time for one CPU thread, else wall-clock time, on a GPU after all its work."""
    if device == "cuda":
        return synchronized_time
    return time.process_time if threads == 1 else time.perf_counter


def synchronized_time() -> float:
    """Wall-clock time in seconds, after all GPU work has finished."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(runs: dict[str, Implementation], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each forward and backward pass, by round; on a GPU after two warm-up rounds."""
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
    """Peak bytes of the loss of residual heads on one trunk output, with gradients but without its arguments."""
    trunk = SimpleNamespace(config=PreTrainedConfig(hidden_size=problem.hidden.shape[1]))
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
    """Peak bytes allocated by PyTorch during `run`, above those before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(run: Callable[[], None]) -> int:
    """The same, from the allocations and releases in the profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))


def report_memory(problem: Problem, peaks: dict[int, int], shape: str) -> None:
    """Print the memory of one and four heads and their ratio, without and with trunk output and unembedding."""
    arguments = problem.hidden.nbytes + problem.unembedding.nbytes
    one = peaks[1]
    result = Table(
        "heads", "peak memory of loss and gradients", "ratio to one head", "ratio with arguments", title=shape
    )
    for heads, peak in peaks.items():
        share, total = peak / one, (peak + arguments) / (one + arguments)
        result.add_row(str(heads), f"{peak / 2**20:.0f} MiB", f"{share:.3f}", f"{total:.3f}")
    CONSOLE.print(result)


def report_time(seconds: dict[str, list[float]], shape: str) -> None:
    """Print the fastest and median time of each, and their ratios to the first."""
    result = Table("forward and backward pass", title=shape)
    for column in ("fastest, s", "median, s", "fastest, ratio to the first", "median, ratio to the first"):
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
