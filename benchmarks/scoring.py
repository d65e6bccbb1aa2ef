"""Speed and memory of token scoring: this project's engines, compared with straightforward implementations.

    .venv/bin/python benchmarks/scoring.py [--model qwen2.5-0.5b] [--sequences 64] [--length 4096] [--json FILE]
    .venv/bin/python benchmarks/scoring.py --model smollm2-135m --sequences 16 --length 2048

Each row scores the same tokens with the same weights in a separate process. Both are random, except for smollm2-135m
where its package is installed (see `support.smollm2`): its weights and Python's documentation. The result is the
fastest of --repeats passes after one warm-up pass; a pass ends with all losses in NumPy arrays. The table also shows
how much longer the slowest pass took. The plain loop runs the model's own code on one sequence at a time. It is
measured first, as the reference for all other losses.

Model FLOP utilisation is the FLOPs of the forward pass per second, divided by the peak of the hardware. Per token:

    2 * (M + S * hidden size * vocabulary) + 4 * layers * query heads * head size * context

with M the matrix parameters of the layers, S the share of scored tokens, and the mean context of causal attention, half
the length of a sequence. Embedding lookups are free. This is the forward third of 6N + 12LHQT in appendix B of
Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", which counts full contexts.

Memory is the peak while scoring, also relative to the loaded engine including vLLM's cache. On a GPU it is memory
allocated by PyTorch, on a CPU resident memory of the process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from support import smollm2
from transformers import AutoConfig, AutoModelForCausalLM

from weighted_mtp.schemas.errors import first_line
from weighted_mtp.schemas.shard_set.manifest import Quantity
from weighted_mtp.scoring.engines.base import Engine, EngineConfig, EngineMethod, Request
from weighted_mtp.scoring.engines.choice import engine_version
from weighted_mtp.scoring.engines.loading import load_engine
from weighted_mtp.scoring.engines.vllm_arguments import engine_arguments
from weighted_mtp.scoring.engines.vllm_engine import VLLM_ENVIRONMENT

ENGINES = {
    "pooler": "vLLM, inside the engine",
    "pooler-entropy": "the same, and entropies",
    "pooler-context": "the same, {:.0%} context only",
    "dicts": "vLLM, prompt_logprobs",
    "prompt_logprobs": "vLLM, prompt_logprobs, flat",
    "transformers": "transformers, batches",
    "transformers-gradient": "the same, and gradients",
    "loop": "transformers, plain loop",
}
COLUMNS = ("tokens/s", "slowest pass", "pooler is N x faster", "MFU", "peak memory", "above loaded", "difference")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads")
SHAPES = {
    "tiny": ("llama", 260, 64, 128, 2, 2, 1),
    "mini": ("llama", 4096, 256, 768, 2, 4, 4),
    "small": ("llama", 32000, 512, 1536, 8, 8, 8),
    "smollm2-135m": ("llama", *smollm2.SHAPE.values()),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2),
}
METHODS = [name for name in ENGINES if "-" not in name]
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Peak of GPUs in dense bfloat16, 1e12 FLOPs per second, by a part of their names."""


class Flops(NamedTuple):
    """Number of tokens, and FLOPs of a pass over all of them: of the layers, and of the head."""

    tokens: int
    layers: float
    head: float


def main() -> None:
    arguments = parse()
    if arguments.one:
        measure(arguments)
        return
    console = Console(width=130)
    setting = describe(arguments)
    for key, value in setting.items():
        console.print(f"{key:>8}  {value}", highlight=False)
    with tempfile.TemporaryDirectory() as directory:
        arguments.work = Path(directory)
        flops = prepare(arguments)
        rows = [run(name, arguments, flops) for name in reversed(selected(arguments))][::-1]
    console.print(report(rows, arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """Settings, with defaults for the available hardware."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SHAPES, default="qwen2.5-0.5b" if gpu else "tiny", help="shape of the model")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--sequences", type=int, default=64 if gpu else 128)
    add("--length", type=int, default=4096 if gpu else 512, help="tokens per sequence, of real text at most")
    add("--shortest", type=int, help="shortest sequence of random tokens; lengths are then log-uniform up to --length")
    add("--batch_tokens", type=int, default=8192, help="tokens computed at once, except in the plain loop")
    add("--engines", nargs="+", choices=METHODS, default=METHODS)
    add("--repeats", type=int, default=3)
    add("--entropy", action="store_true", help="also measure the pooler with entropies")
    add("--gradient", action="store_true", help="also measure the transformers engine with gradients")
    add(
        "--first_scored",
        type=float,
        default=0.0,
        help="also measure the pooler with this share of each sequence as context only",
    )
    add("--peak_tflops", type=float, help="peak of the hardware; by default known for H100, H200 and A100 in bfloat16")
    add("--json", type=Path, help="output file for the settings and rows")
    add("--one", choices=ENGINES, help=argparse.SUPPRESS)
    add("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.real = arguments.model == "smollm2-135m" and smollm2.package() is not None
    if not 0 <= arguments.first_scored < 1 or not 2 <= (arguments.shortest or arguments.length) <= arguments.length:
        parser.error("--first_scored must be at least 0 and less than 1, and 2 <= --shortest <= --length")
    if not arguments.one and arguments.peak_tflops is None and gpu and arguments.dtype == "bfloat16":
        device = torch.cuda.get_device_name()
        arguments.peak_tflops = next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    return arguments


def selected(arguments: argparse.Namespace) -> list[str]:
    """The engines to measure, in the order of the table."""
    wanted = {*arguments.engines}
    if "pooler" in wanted:
        wanted |= {"pooler-entropy"} if arguments.entropy else set()
        wanted |= {"pooler-context"} if arguments.first_scored else set()
    if "transformers" in wanted:
        wanted |= {"transformers-gradient"} if arguments.gradient else set()
    return [name for name in ENGINES if name in wanted]


def describe(arguments: argparse.Namespace) -> dict[str, str]:
    """Facts about hardware, software, model and tokens."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    load = f"{arguments.threads} threads used, load average before {os.getloadavg()[0]:.1f}"
    vllm = engine_version("vllm") if find_spec("vllm") else "not installed"
    shortest = 2 if arguments.real else arguments.shortest
    lengths = f"{shortest} to {arguments.length}" if shortest else f"{arguments.length}"
    kind = "documentation of Python" if arguments.real else "random tokens"
    tokens = f"{kind}, {arguments.sequences} sequences of {lengths} tokens, {arguments.batch_tokens} at once"
    return {
        "machine": f"{machine}, {len(os.sched_getaffinity(0))} cores, {load}",
        "software": f"torch {torch.__version__}, vllm {vllm}, transformers {transformers.__version__}",
        "model": f"{arguments.model}, {arguments.dtype}, {'real' if arguments.real else 'random'} weights",
        "tokens": f"{tokens}, fastest of {arguments.repeats} passes after one to warm up",
    }


def prepare(arguments: argparse.Namespace) -> Flops:
    """Write model and tokens into the directory `work`; returns the FLOPs of the layers and of the head."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    directory, dtype = arguments.work / "model", getattr(torch, arguments.dtype)
    if arguments.real:
        rows = smollm2.real_rows(smollm2.write_checkpoint(directory, dtype), arguments.sequences, arguments.length)
        model = AutoModelForCausalLM.from_pretrained(directory)
    else:
        architecture, *numbers = SHAPES[arguments.model]
        sizes = dict(zip(SIZES + HEADS, numbers, strict=True))
        sizes["max_position_embeddings"] = max(32768, arguments.length)
        config = AutoConfig.for_model(architecture, **sizes, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        model.save_pretrained(directory)
        rng = np.random.default_rng(0)
        ends = np.log([arguments.shortest or arguments.length, arguments.length])
        logarithms = rng.uniform(*ends, arguments.sequences)
        rows = [rng.integers(0, config.vocab_size, round(np.exp(x)), dtype=np.int32) for x in logarithms]
    np.savez(arguments.work / "tokens.npz", *rows)
    config, lengths = model.config, np.array([len(row) for row in rows])
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * (lengths**2).sum() / 2
    head = 2.0 * config.hidden_size * config.vocab_size * lengths.sum()
    return Flops(int(lengths.sum()), float(2 * matrices * lengths.sum() + attention), float(head))


def run(name: str, arguments: argparse.Namespace, flops: Flops) -> dict[str, Any]:
    """One row, measured in a separate process."""
    row: dict[str, Any] = {"engine": name}
    if name.partition("-")[0] not in ("transformers", "loop") and not find_spec("vllm"):
        return row | {"error": "vLLM is not installed"}
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--work", str(arguments.work)]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | VLLM_ENVIRONMENT | threads | {"HF_HUB_OFFLINE": "1"}
    with Console(stderr=True).status(f"measuring {name}"):
        process = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    result = arguments.work / f"{name}.json"
    row |= json.loads(result.read_text()) if result.exists() else {"error": f"ended with status {process.returncode}"}
    if "error" in row:
        return row | {"log": process.stderr[-8000:]}
    row["tokens_per_second"] = flops.tokens / min(row["seconds"])
    row["flops_per_token"] = (flops.layers + flops.head * row["scored"]) / flops.tokens
    if arguments.peak_tflops:
        row["utilisation"] = row["tokens_per_second"] * row["flops_per_token"] / arguments.peak_tflops / 1e12
    return row


def measure(arguments: argparse.Namespace) -> None:
    """Write one row, or an error message, into the directory `work`."""
    result = arguments.work / f"{arguments.one}.json"
    try:
        result.write_text(json.dumps(measured(arguments)))
    except Exception as error:
        result.write_text(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))
        raise


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each pass, memory in bytes, share of scored tokens, largest difference from the plain loop."""
    name, _, variant = arguments.one.partition("-")
    context = arguments.first_scored if variant == "context" else 0.0
    more: dict[str, Quantity] = {"entropy": "entropy", "gradient": "gradient"}
    quantities = ("loss", *([more[variant]] if variant in more else []))
    tokens = list(np.load(arguments.work / "tokens.npz").values())
    requests = [Request(ids, int(len(ids) * context), quantities) for ids in tokens]
    torch.set_num_threads(arguments.threads)
    engine = load(name, arguments)
    engine.score([Request(tokens[0][:2])])  # part of loading: first use may read weights from disk
    loaded = peak_memory(reset=True)
    seconds = []
    for _ in range(1 + arguments.repeats):
        start = time.perf_counter()
        scores = engine.score(requests)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory()
    losses = [score[0] for score in scores]
    row = {"seconds": seconds[1:], "scored": sum(map(len, losses)) / sum(map(len, tokens))}
    row |= {"peak_bytes": peak, "above_loaded_bytes": peak - loaded}
    expected = arguments.work / "loop.npz"
    if name == "loop":
        np.savez(expected, *losses)
    if expected.exists():
        pairs = zip(losses, np.load(expected).values(), strict=True)
        row["largest_difference"] = max(float(np.nanmax(np.abs(a - b[len(b) - len(a) :]))) for a, b in pairs)
    return row


def peak_memory(reset: bool = False) -> int:
    """Peak bytes in use since the last reset; with `reset`, the bytes in use now."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def load(name: str, arguments: argparse.Namespace) -> Engine:
    """Load one of this project's engines, or one from this file."""
    method: EngineMethod | None = "prompt_logprobs" if name in ("dicts", "prompt_logprobs") else None
    config = EngineConfig(
        name="transformers" if name in ("transformers", "loop") else "vllm",
        method="pooler" if name == "pooler" else method,
        dtype=arguments.dtype,
        batch_tokens=arguments.batch_tokens,
        max_length=arguments.length,
        threads=arguments.threads,
        on_gpu=torch.cuda.is_available(),
    )
    written_here: dict[str, Callable[[Path, EngineConfig], Engine]] = {"dicts": PromptLogprobs, "loop": PlainLoop}
    return written_here.get(name, load_engine)(arguments.work / "model", config)


class PromptLogprobs:
    """vLLM's offline interface in its usual form, with this project's engine arguments."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        from vllm import LLM, SamplingParams

        self.model = LLM(**engine_arguments(model, config))
        self.params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        prompts = [{"prompt_token_ids": request.input_ids.tolist()} for request in requests]
        results = []
        for output in self.model.generate(prompts, self.params, use_tqdm=False):
            entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            results.append(np.array([[np.nan, *(-entry[token].logprob for token, entry in entries)]], np.float32))
        return results


class PlainLoop:
    """Hugging Face transformers, one sequence at a time."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        self.device = "cuda" if config.on_gpu else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        self.model = loaded.to(self.device).eval()

    @torch.inference_mode()
    def score(self, requests: list[Request]) -> list[np.ndarray]:
        """See `Engine.score`."""
        results = []
        for request in requests:
            ids = torch.tensor(request.input_ids, dtype=torch.int64, device=self.device)[None]
            log_probabilities = self.model(ids).logits[0, :-1].float().log_softmax(-1)
            losses = -log_probabilities.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy()
            results.append(np.append(np.float32(np.nan), losses)[None])
        return results


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    """The table of all rows."""
    table = Table("engine", caption="memory in MiB; difference of losses from the plain loop in nats")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    pooler = next((row.get("tokens_per_second") for row in rows if row["engine"] == "pooler"), None)
    for row in rows:
        name = ENGINES[row["engine"]].format(arguments.first_scored)
        if "error" in row:
            table.add_row(name, "failed")
            table.caption = f"{table.caption}\n{name}: {escape(row['error'])}"
            continue
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{max(row['seconds']) / min(row['seconds']) - 1:+.0%}",
            f"{pooler / row['tokens_per_second']:.2f}" if pooler else "",
            f"{row['utilisation']:.1%}" if "utilisation" in row else "",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['above_loaded_bytes'] / 2**20:,.0f}",
            f"{row['largest_difference']:.1e}" if "largest_difference" in row else "",
        )
    return table


if __name__ == "__main__":
    main()
