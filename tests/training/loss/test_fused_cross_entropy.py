"""The Triton kernel in Triton's interpreter against the plain form and autograd, and its compilation for GPUs.

The interpreter cuts float32 to bfloat16 where GPUs round, so bfloat16 gradients may differ by one unit in the last
place.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from chunk_cases import Results, Whole, extreme_chunks, fused_results, ordinary_chunks, run, run_whole, whole_problem
from torch import Tensor
from torch.nn.functional import cross_entropy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

ORDINARY = ordinary_chunks()
EXTREME = extreme_chunks()
RELATIVE_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

COMPILE = """
import sys, triton
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weighted_mtp.training.loss.fused_cross_entropy import BLOCK, WARPS, cross_entropy_kernel

dtype = sys.argv[1]
for capability, weights, bias, softcap in product((80, 90), ("*fp32", None), ("*fp32", None), ("fp32", None)):
    types = {
        "logits": "*" + dtype, "targets": "*i64", "weights": weights, "bias": bias, "losses": "*fp32",
        "correct": "*i1", "softcap": softcap, "vocabulary": None, "block": None,
    }
    constants = {name: None for name, kind in types.items() if kind is None}
    constants |= {"vocabulary": 50257, "block": BLOCK}
    signature = {name: kind or "constexpr" for name, kind in types.items()}
    kernel = triton.compile(
        ASTSource(cross_entropy_kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS},
    )
    assert f"sm_{capability}" in kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    rows = [line for line in kernel.asm["ttir"].splitlines() if "tt.addptr %logits" in line]
    assert rows and all(line.split(" loc(")[0].endswith("i64") for line in rows), rows
"""


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    """The results of the fused form, by the name of the case."""
    return fused_results("cpu", tmp_path_factory.mktemp("fused") / "results.pt")


@pytest.mark.parametrize("name", ORDINARY)
def test_equals_the_plain_form(name: str, fused: dict[str, tuple[Tensor, ...]]) -> None:
    chunk, own = ORDINARY[name], Results(*fused[name])
    plain = run(chunk, fused=False)
    assert own.correct.tolist() == plain.correct.tolist()
    assert own.correct[2] or chunk.bias is not None
    torch.testing.assert_close(own.losses, plain.losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(own.gradient, plain.gradient, rtol=RELATIVE_ERROR[chunk.logits.dtype], atol=1e-6)
    assert not own.gradient[3].any()  # weight 0
    assert torch.equal(own.losses_alone, own.losses)
    assert torch.equal(own.logits_alone, chunk.logits)  # without weights, nothing is written


@pytest.mark.parametrize("name", ORDINARY)
def test_equals_autograd_in_float64(name: str, fused: dict[str, tuple[Tensor, ...]]) -> None:
    chunk, own = ORDINARY[name], Results(*fused[name])
    leaf = chunk.logits.double().requires_grad_()
    logits = leaf if chunk.bias is None else leaf + chunk.bias
    if chunk.softcap:
        logits = chunk.softcap * torch.tanh(logits / chunk.softcap)
    losses = cross_entropy(logits, chunk.targets, reduction="none")
    [gradient] = torch.autograd.grad(losses @ chunk.weights.double(), leaf)
    torch.testing.assert_close(own.losses.double(), losses.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(own.gradient.double(), gradient, rtol=RELATIVE_ERROR[chunk.logits.dtype], atol=1e-6)


@pytest.mark.parametrize("name", EXTREME)
def test_ties_infinities_and_nan_as_in_the_plain_form(name: str, fused: dict[str, tuple[Tensor, ...]]) -> None:
    chunk, own = EXTREME[name], Results(*fused[name])
    plain = run(chunk, fused=False)
    torch.testing.assert_close(own.losses, plain.losses, rtol=1e-6, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(
        own.gradient, plain.gradient, rtol=RELATIVE_ERROR[chunk.logits.dtype], atol=1e-6, equal_nan=True
    )
    assert own.correct.tolist() == (plain.correct & ~plain.losses.isnan()).tolist()
    assert (own.losses.isnan() | (own.losses >= 0)).all()


def test_extreme_rows_have_the_losses_that_they_are_for(fused: dict[str, tuple[Tensor, ...]]) -> None:
    losses, correct, *_ = fused["extreme"]
    assert losses.isfinite().tolist() == 3 * [True] + 6 * [False] + 4 * [True]
    assert losses[3] == torch.inf
    assert correct.tolist() == [True] + 8 * [False] + [True] + 3 * [False]
    assert losses[9:11].tolist() == pytest.approx([0, 300], abs=5)


def test_a_target_outside_the_vocabulary_has_a_nan_loss(fused: dict[str, tuple[Tensor, ...]]) -> None:
    own = Results(*fused["outside"])
    assert own.losses.isnan().all()
    assert not own.correct.any()


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_of_several_chunks(
    matmul_dtype: torch.dtype, fused: dict[str, tuple[Tensor, ...]]
) -> None:
    own = Whole(*fused[f"whole-{matmul_dtype}"])
    hidden, *_ = whole_problem()
    error = 1e-5 if matmul_dtype == torch.float32 else 2e-2
    for of_fused, of_plain in zip(own, run_whole(matmul_dtype, fused=False), strict=True):
        torch.testing.assert_close(of_fused, of_plain, rtol=error, atol=error)
    hidden, unembedding, bias, targets, weights = (value.detach() for value in whole_problem())
    leaves = [value.double().requires_grad_() for value in (hidden, unembedding, bias)]
    losses = cross_entropy(5 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 5), targets, reduction="none")
    for of_fused, exact in zip(own, (losses, *torch.autograd.grad(losses @ weights.double(), leaves)), strict=True):
        torch.testing.assert_close(of_fused.double(), exact.detach(), rtol=error, atol=2 * error)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_for_gpus_with_64_bit_offsets_of_rows(dtype: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
