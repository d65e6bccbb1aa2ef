"""The steps of `make gpu`, in order: tests marked `gpu`, then benchmarks."""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Step(NamedTuple):
    """One command, in a process of its own.

    Attributes:
        name: name of its files.
        part: number of the part it belongs to; the limits of a part sum up to at most 9 minutes.
        limit: seconds after which it is ended.
        script: file below the root of the project: a file of tests, or a benchmark.
        arguments: arguments on a GPU.
        small: arguments of a rehearsal on a CPU.
    """

    name: str
    part: int
    limit: int
    script: str
    arguments: str = ""
    small: str = ""

    @property
    def is_test(self) -> bool:
        """Whether the step runs tests."""
        return self.script.startswith("tests/")

    def command(self, rehearse: bool, figures: Path) -> list[str]:
        """The command, which writes its figures to a file: benchmarks JSON, tests JUnit XML."""
        if self.is_test:
            options = ["-o", "junit_family=xunit1", *(["--rehearse"] if rehearse else [])]
            return [sys.executable, "-m", "pytest", self.script, *options, "--junit-xml", str(figures)]
        arguments = self.small if rehearse else self.arguments
        return [sys.executable, self.script, *arguments.split(), "--json", str(figures)]


QWEN = "--model qwen2.5-0.5b"
STEPS = (
    Step("documents", 1, 180, "tests/gpu/test_documents.py"),
    Step("loss-kernels", 1, 60, "tests/gpu/test_loss_kernels.py"),
    Step("pooler", 1, 120, "tests/gpu/test_pooler.py"),
    Step("faults", 1, 180, "tests/gpu/test_faults.py"),
    Step("several-engines", 2, 150, "tests/gpu/test_several_engines.py"),
    Step(
        "scoring",
        2,
        270,
        "benchmarks/scoring.py",
        f"{QWEN} --entropy --engines pooler prompt_logprobs transformers loop",
        "--model tiny --sequences 4 --length 64 --repeats 1 --engines pooler loop",
    ),
    Step(
        "loss",
        2,
        120,
        "benchmarks/loss.py",
        "--device cuda --dtype bfloat16 --rows 16384 --hidden 896 --vocabulary 151936 --rounds 10",
        "--rows 64 --hidden 32 --vocabulary 100 --rounds 1",
    ),
    Step(
        "training-heads",
        3,
        180,
        "benchmarks/training.py",
        f"{QWEN} --only selection --rounds 20",
        "--model tiny --one_by_one --only selection --rounds 1",
    ),
    Step(
        "training-trainers",
        3,
        180,
        "benchmarks/training.py",
        f"{QWEN} --only trainers --rounds 20",
        "--model tiny --one_by_one --only trainers --rounds 1",
    ),
    Step(
        "training-flex",
        3,
        180,
        "benchmarks/training.py",
        f"{QWEN} --only selection --rounds 20 --attention flex_attention",
        "--model tiny --one_by_one --only selection --rounds 1 --attention eager",
    ),
    Step(
        "training-compiled",
        4,
        270,
        "benchmarks/training.py",
        f"{QWEN} --only selection --rounds 20 --compile",
        "--model tiny --one_by_one --only weighting --rounds 1 --compile",
    ),
    Step("loader", 4, 120, "benchmarks/loader.py", "", "--tokens 100000 --rounds 1 --steps 5"),
    Step(
        "scoring-1.5b",
        4,
        150,
        "benchmarks/scoring.py",
        "--model qwen2.5-1.5b --batch_tokens 16384 --engines pooler loop",
        "--model tiny --sequences 4 --length 64 --repeats 1 --batch_tokens 128 --engines loop",
    ),
    Step("fused-kernel", 5, 240, "tests/gpu/test_fused_kernel.py"),
)
PARTS = sorted({step.part for step in STEPS})
